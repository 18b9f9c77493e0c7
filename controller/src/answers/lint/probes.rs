//! Rules that block health probes of load balancers (`reference/azure.md` §1.8).

use super::view::View;
use super::{Findings, Severity, rule_path};
use crate::answers::regions::{ANY_PORT, ports_cover};
use crate::policy::network::{Access, Direction};

/// Deny rules that take TCP from 168.63.129.16 to a pool member before AllowAzureLoadBalancerInBound allows it.
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
            let every_port = ports_cover(&rule.destination_ports, &[ANY_PORT]);
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
                    Severity::Info,
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
