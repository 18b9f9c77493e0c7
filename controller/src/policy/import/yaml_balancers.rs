//! Writes the load balancers of a draft as YAML.

use super::draft::{Draft, Flow, NatTarget};
use super::yaml::{Writer, flag, list, scalar};

/// `loadBalancers`, each part on a line of its own.
pub fn balancers(draft: &Draft, out: &mut Writer) {
    if !draft.balancers.is_empty() {
        out.line(0, "loadBalancers:");
    }
    for balancer in &draft.balancers {
        out.line(1, &format!("- name: {}", scalar(&balancer.name)));
        let empty = if balancer.frontends.is_empty() { " []" } else { "" };
        out.line(2, &format!("frontendIPConfigurations:{empty}"));
        for frontend in &balancer.frontends {
            let public = if frontend.prefix { "publicIPPrefix" } else { "publicIPAddress" };
            out.item(3, &[("name", scalar(&frontend.name)), (public, scalar(&frontend.public))], None);
        }
        section("backendAddressPools", &balancer.pools, out, |pool| {
            let mut fields = vec![("name", scalar(&pool.name))];
            if !pool.members.is_empty() {
                let members: Vec<_> = pool.members.iter().map(|member| &member.name).collect();
                fields.push(("backendIPConfigurations", list(&members)));
            }
            fields
        });
        section("probes", &balancer.probes, out, |probe| {
            let mut fields = vec![("name", scalar(&probe.name))];
            fields.push(("protocol", if probe.path.is_some() { "Http" } else { "Tcp" }.to_owned()));
            fields.push(("port", probe.port.to_string()));
            fields.extend(probe.path.iter().map(|path| ("requestPath", scalar(path))));
            fields.extend(probe.interval.map(|seconds| ("intervalInSeconds", seconds.to_string())));
            fields.extend(probe.threshold.map(|count| ("probeThreshold", count.to_string())));
            fields
        });
        let frontend = |at: usize| scalar(&balancer.frontends[at].name);
        let pool = |at: usize| scalar(&balancer.pools[at].name);
        section("loadBalancingRules", &balancer.rules, out, |rule| {
            let mut fields = vec![
                ("name", scalar(&rule.name)),
                ("frontendIPConfiguration", frontend(rule.frontend)),
                ("backendAddressPool", pool(rule.pool)),
                ("protocol", rule.protocol.to_owned()),
                ("frontendPort", rule.frontend_port.to_string()),
                ("backendPort", rule.backend_port.to_string()),
            ];
            fields.extend(rule.probe.map(|probe| ("probe", scalar(&balancer.probes[probe].name))));
            fields.extend(rule.distribution.map(|word| ("loadDistribution", word.to_owned())));
            flow(&rule.flow, &mut fields);
            flag(rule.disable_outbound_snat, "disableOutboundSnat", &mut fields);
            fields
        });
        section("inboundNatRules", &balancer.nat_rules, out, |rule| {
            let mut fields = vec![
                ("name", scalar(&rule.name)),
                ("frontendIPConfiguration", frontend(rule.frontend)),
                ("protocol", rule.protocol.to_owned()),
            ];
            match &rule.target {
                NatTarget::Single { port, member } => {
                    fields.push(("frontendPort", port.to_string()));
                    fields.push(("backendIPConfiguration", scalar(&member.name)));
                }
                NatTarget::Range { first, last, pool: at } => {
                    fields.push(("frontendPortRangeStart", first.to_string()));
                    fields.push(("frontendPortRangeEnd", last.to_string()));
                    fields.push(("backendAddressPool", pool(*at)));
                }
            }
            fields.push(("backendPort", rule.backend_port.to_string()));
            flow(&rule.flow, &mut fields);
            fields
        });
        section("outboundRules", &balancer.outbound_rules, out, |rule| {
            let names: Vec<_> = rule.frontends.iter().map(|at| &balancer.frontends[*at].name).collect();
            let mut fields = vec![
                ("name", scalar(&rule.name)),
                ("frontendIPConfigurations", list(&names)),
                ("backendAddressPool", pool(rule.pool)),
                ("protocol", rule.protocol.to_owned()),
            ];
            fields.extend(rule.ports.map(|ports| ("allocatedOutboundPorts", ports.to_string())));
            fields.extend(rule.idle_minutes.map(|minutes| ("idleTimeoutInMinutes", minutes.to_string())));
            flag(rule.tcp_reset, "enableTcpReset", &mut fields);
            fields
        });
    }
}

/// The fields of an item, in their order.
pub type Fields = Vec<(&'static str, String)>;

/// A list of a load balancer, one line for each item; nothing if it is empty.
fn section<T>(name: &str, items: &[T], out: &mut Writer, fields: impl Fn(&T) -> Fields) {
    if !items.is_empty() {
        out.line(2, &format!("{name}:"));
    }
    for item in items {
        out.item(3, &fields(item), None);
    }
}

fn flow(flow: &Flow, fields: &mut Fields) {
    fields.extend(flow.idle_minutes.map(|minutes| ("idleTimeoutInMinutes", minutes.to_string())));
    flag(flow.tcp_reset, "enableTcpReset", fields);
    flag(flow.floating_ip, "enableFloatingIP", fields);
}
