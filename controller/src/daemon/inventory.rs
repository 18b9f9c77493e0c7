//! A policy as a list of things, each under its path in the file with one line that says what it is, by names and not by
//! indices: so two policies can be compared (`plan`).

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::fmt::Debug;
use std::hash::{Hash as _, Hasher as _};

use crate::answers::expand::tag_name;
use crate::policy::network::{
    AddressMatch, LoadBalancer, NatTarget, Network, PublicAddress, SecurityRule, TransportProtocol,
};

/// Path -> what stands there.
pub type Inventory = BTreeMap<String, String>;

/// Everything in a policy.
pub fn inventory(network: &Network) -> Inventory {
    let mut all = Inventory::new();
    let mut add = |path: String, line: String| _ = all.insert(path, line);
    for (of, vnet) in network.virtual_networks.iter().enumerate() {
        let path = format!("virtualNetworks/{}", vnet.name);
        let peers: Vec<&str> =
            vnet.peers.iter().map(|&i| network.virtual_networks[i].name.as_str()).collect();
        add(path.clone(), format!("{}{}", join(&vnet.address_space), said(", peered with ", &peers)));
        for subnet in network.subnets.iter().filter(|subnet| subnet.network == of) {
            let group = named(", group ", subnet.group.map(|i| &network.groups[i].name));
            let table = named(", route table ", subnet.route_table.map(|i| &network.route_tables[i].name));
            let default = if subnet.default_outbound { ", default outbound" } else { "" };
            let gateways = said(", gateway ", &subnet.gateways);
            let line = format!("{}{gateways}{group}{table}{default}", join(&subnet.prefixes));
            add(format!("{path}/subnets/{}", subnet.name), line);
        }
    }
    for interface in &network.interfaces {
        let path = format!("networkInterfaces/{}", interface.name);
        let group = named(", group ", interface.group.map(|i| &network.groups[i].name));
        let mac = interface.mac.map_or_else(String::new, |mac| format!(", MAC {mac:02x?}"));
        add(path.clone(), format!("device {}, hook {:?}{mac}{group}", interface.device, interface.hook));
        for configuration in &interface.addresses {
            let subnet = &network.subnets[configuration.subnet];
            let vnet = &network.virtual_networks[subnet.network].name;
            let public = configuration.public_address.map(|i| &network.public_addresses[i]);
            let public = public.map_or_else(String::new, |p| format!(", public {} ({})", p.address, p.name));
            let groups = configuration.application_groups.iter();
            let groups: Vec<&str> = groups.map(|&i| network.application_groups[i].name.as_str()).collect();
            let line = format!(
                "{} in {vnet}/{}{public}{}",
                configuration.address,
                subnet.name,
                said(", in ", &groups)
            );
            add(format!("{path}/ipConfigurations/{}", configuration.name), line);
        }
    }
    for group in &network.groups {
        let path = format!("networkSecurityGroups/{}", group.name);
        add(path.clone(), "a group".to_owned());
        for rule in &group.rules {
            add(format!("{path}/securityRules/{}", rule.name), rule_line(network, rule));
        }
    }
    for group in &network.application_groups {
        add(format!("applicationSecurityGroups/{}", group.name), "a group of applications".to_owned());
    }
    for tag in &network.tags {
        let mut hasher = DefaultHasher::new();
        tag.prefixes.hash(&mut hasher);
        let line = format!("{} prefixes ({:016x})", tag.prefixes.len(), hasher.finish());
        add(format!("serviceTags/{}", tag.name), line);
    }
    for table in &network.route_tables {
        let path = format!("routeTables/{}", table.name);
        add(path.clone(), format!("widens VirtualNetwork: {}", table.widen_virtual_network));
        for route in &table.routes {
            add(format!("{path}/routes/{}", route.name), format!("{} to {:?}", route.prefix, route.next_hop));
        }
    }
    for public in &network.public_addresses {
        add(format!("publicIPAddresses/{}", public.name), public_line(public));
    }
    for balancer in &network.load_balancers {
        of_balancer(network, balancer, &mut add);
    }
    for uplink in &network.uplinks {
        let line = format!("hook {:?}, reserves host ports: {}", uplink.hook, uplink.reserve_host_ports);
        add(format!("uplinks/{}", uplink.device), line);
    }
    for service in &network.platform.services {
        let line = format!("{:?} {}:{}", service.protocol, service.address, service.port);
        add(format!("platform/services/{}", service.name), line);
    }
    let platform = &network.platform;
    let kms = join(&platform.kms_servers);
    let settings: [(&str, String); 9] = [
        ("platform", format!("KMS {} ({kms}), SMTP blocked {}", platform.allow_kms, platform.block_smtp)),
        ("onRuleChange", format!("{:?}", network.on_rule_change)),
        ("limits", format!("{:?}", network.limits)),
        ("snat", format!("{:?}", network.snat)),
        ("hostAccess", format!("{:?}", network.host_access)),
        ("timeouts", format!("{:?}", network.timeouts)),
        ("flowTable", format!("{:?}", network.flow_table)),
        ("adoption", format!("{:?}", network.adoption)),
        ("serviceTagsFile", format!("{:?}", network.tag_file)),
    ];
    for (path, line) in settings {
        add(path.to_owned(), line);
    }
    if let Some(default) = &network.default_outbound {
        let publics: Vec<String> =
            default.public_addresses.iter().map(|&i| public_line(&network.public_addresses[i])).collect();
        let line = format!("{}, idle {:?} s", publics.join(" and "), default.idle_timeout_seconds);
        add("defaultOutbound".to_owned(), line);
    }
    all
}

fn of_balancer(network: &Network, balancer: &LoadBalancer, add: &mut impl FnMut(String, String)) {
    let path = format!("loadBalancers/{}", balancer.name);
    add(path.clone(), format!("allocation {:?}, frontends {:?}", balancer.allocation, balancer.frontend_use));
    let frontend = |number: usize| {
        let frontend = &balancer.frontends[number];
        let publics =
            frontend.public_addresses.iter().map(|&i| network.public_addresses[i].address.to_string());
        publics.collect::<Vec<_>>().join(", ")
    };
    let member = |&(interface, configuration): &(usize, usize)| {
        let interface = &network.interfaces[interface];
        format!("{}/{}", interface.name, interface.addresses[configuration].name)
    };
    let pool = |number: usize| balancer.pools[number].name.as_str();
    for (number, of) in balancer.frontends.iter().enumerate() {
        add(format!("{path}/frontendIPConfigurations/{}", of.name), frontend(number));
    }
    for pool in &balancer.pools {
        let members: Vec<String> = pool.members.iter().map(member).collect();
        let line = format!("{} members: {}", members.len(), members.join(", "));
        add(format!("{path}/backendAddressPools/{}", pool.name), line);
    }
    for rule in &balancer.outbound_rules {
        let frontends: Vec<String> = rule.frontends.iter().map(|&f| frontend(f)).collect();
        let line = format!(
            "{} for pool {} under {}, {} ports each, idle {:?} s, reset {}",
            protocol(rule.protocol),
            pool(rule.pool),
            frontends.join(", "),
            rule.allocated_outbound_ports,
            rule.idle_timeout_seconds,
            rule.tcp_reset
        );
        add(format!("{path}/outboundRules/{}", rule.name), line);
    }
    for rule in &balancer.rules {
        let probe = named(", probe ", rule.probe.map(|i| &balancer.probes[i].name));
        let line = format!(
            "{} {}:{} to pool {}, port {}, by {:?}, idle {:?} s, reset {}, floating {}, no SNAT {}{probe}",
            protocol(rule.protocol),
            frontend(rule.frontend),
            rule.frontend_port,
            pool(rule.pool),
            rule.backend_port,
            rule.distribution,
            rule.idle_timeout_seconds,
            rule.tcp_reset,
            rule.floating_ip,
            rule.disable_outbound_snat
        );
        add(format!("{path}/loadBalancingRules/{}", rule.name), line);
    }
    for rule in &balancer.nat_rules {
        let (ports, to) = match &rule.target {
            NatTarget::Single { frontend_port, member: to } => (frontend_port.to_string(), member(to)),
            NatTarget::Range { first, last, pool: of } => {
                (format!("{first}-{last}"), format!("pool {}", pool(*of)))
            }
        };
        let line = format!(
            "{} {}:{ports} to {to}, port {}, idle {:?} s, reset {}, floating {}",
            protocol(rule.protocol),
            frontend(rule.frontend),
            rule.backend_port,
            rule.idle_timeout_seconds,
            rule.tcp_reset,
            rule.floating_ip
        );
        add(format!("{path}/inboundNatRules/{}", rule.name), line);
    }
    for probe in &balancer.probes {
        let line = format!(
            "{:?} port {}, every {} s, threshold {}",
            probe.protocol, probe.port, probe.interval_seconds, probe.threshold
        );
        add(format!("{path}/probes/{}", probe.name), line);
    }
}

fn rule_line(network: &Network, rule: &SecurityRule) -> String {
    let term = |term: &AddressMatch| match term {
        AddressMatch::Any => "*".to_owned(),
        AddressMatch::Prefix(prefix) => prefix.to_string(),
        AddressMatch::Tag(tag) => tag_name(network, *tag).to_owned(),
        AddressMatch::Application(number) => network.application_groups[*number].name.clone(),
    };
    let side = |terms: &[AddressMatch], ports: &[(u16, u16)]| {
        let terms: Vec<String> = terms.iter().map(term).collect();
        let port = |&(first, last): &(u16, u16)| match (first, last) {
            (0, 65535) => "*".to_owned(),
            (first, last) if first == last => first.to_string(),
            (first, last) => format!("{first}-{last}"),
        };
        let ports: Vec<String> = ports.iter().map(port).collect();
        format!("{} port {}", terms.join(","), ports.join(","))
    };
    format!(
        "{:?} {} {:?} {:?} from {} to {}",
        rule.direction,
        rule.priority,
        rule.access,
        rule.protocol,
        side(&rule.source, &rule.source_ports),
        side(&rule.destination, &rule.destination_ports)
    )
}

fn public_line(public: &PublicAddress) -> String {
    format!("{}, announced {:?}", public.address, public.announce)
}

fn protocol(protocol: TransportProtocol) -> String {
    format!("{protocol:?}")
}

fn join<T: ToString>(all: &[T]) -> String {
    all.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// The words and what follows them, if anything does.
fn said<T: ToString>(words: &str, all: &[T]) -> String {
    if all.is_empty() { String::new() } else { format!("{words}{}", join(all)) }
}

fn named(words: &str, name: Option<impl Debug + AsRef<str>>) -> String {
    name.map_or_else(String::new, |name| format!("{words}{}", name.as_ref()))
}
