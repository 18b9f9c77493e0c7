//! Rules that block health probes of load balancers (`reference/azure.md` §1.8).

use super::view::View;
use super::{Findings, Severity, rule_path};
use crate::answers::regions::{ANY_PORT, ports_cover};
use crate::policy::network::{Access, Direction};

/// Deny rules that take TCP from 168.63.129.16 to a pool member, at the ports it is probed at if it is, before
/// AllowAzureLoadBalancerInBound allows it.
pub(super) fn check(views: &[View<'_>], findings: &mut Findings<'_>) {
    let mut told = std::collections::HashSet::new();
    for view in views.iter().filter(|view| view.direction == Direction::Inbound) {
        if view.space.is_empty(view.probes) {
            continue;
        }
        let mut let_through: Vec<&str> = Vec::new();
        for index in view.own() {
            let rule = view.rules[index];
            if view.takes(index, view.probes).is_none() {
                continue;
            }
            if rule.access == Access::Allow {
                let_through.push(&rule.name);
                continue;
            }
            let about = rule_path(view.network, view.group, rule);
            if !told.insert(about.clone()) {
                continue;
            }
            let title = format!("Inbound rule {} ({})", rule.name, rule.priority);
            let every_port = ports_cover(&rule.destination_ports, &view.probed);
            let (severity, message) = match (every_port, let_through.is_empty()) {
                (true, true) => (
                    Severity::Error,
                    format!(
                        "{title} drops every health probe (from 168.63.129.16) to members of a load balancer's \
                         pool: they will be taken for dead"
                    ),
                ),
                (true, false) => (
                    Severity::Warning,
                    format!(
                        "{title} drops health probes (from 168.63.129.16) to members of a load balancer's pool \
                         unless {} allows them",
                        let_through.join(" or ")
                    ),
                ),
                (false, _) => (
                    // Unless it is known at which ports backends are probed, nobody may ask there.
                    if view.probed == [ANY_PORT] { Severity::Info } else { Severity::Warning },
                    format!("{title} drops health probes (from 168.63.129.16) to the ports it names"),
                ),
            };
            findings.add(
                "PC301",
                severity,
                about,
                message,
                "allow AzureLoadBalancer before it: { access: Allow, direction: Inbound, sourceAddressPrefix: \
                 AzureLoadBalancer }",
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::answers::lint::{Severity, Surroundings, lint};
    use crate::policy::network::{
        Access, AddressMatch, Direction, Places, RuleProtocol, SecurityGroup, SecurityRule, ServiceTag,
    };
    use crate::probes::balanced_policy;

    /// PC301 of a group on a backend that is probed at 8080, with a rule that denies probes to these ports.
    fn told(ports: (u16, u16)) -> Vec<Severity> {
        let mut network = balanced_policy();
        let rule = SecurityRule {
            name: "NoProbes".into(),
            description: String::new(),
            priority: 100,
            direction: Direction::Inbound,
            access: Access::Deny,
            protocol: RuleProtocol::Tcp,
            source: vec![AddressMatch::Tag(ServiceTag::AzureLoadBalancer)],
            destination: vec![AddressMatch::Any],
            source_ports: vec![(0, 65535)],
            destination_ports: vec![ports],
        };
        network.groups.push(SecurityGroup { name: "web".into(), rules: vec![rule] });
        network.interfaces[0].group = Some(0);
        let report = lint(&network, &Places::default(), Surroundings::default());
        report.findings.iter().filter(|found| found.code == "PC301").map(|found| found.severity).collect()
    }

    #[test]
    fn a_rule_that_denies_probes_at_the_probed_port_is_an_error_and_at_other_ports_nothing() {
        assert_eq!(told((8080, 8080)), [Severity::Error]);
        assert_eq!(told((0, 65535)), [Severity::Error]);
        assert_eq!(told((9000, 9999)), []);
    }
}
