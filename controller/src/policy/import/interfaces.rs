//! Network interfaces as the input has them.

use std::net::IpAddr;

use super::names::render;
use super::object::{Field, Reference};
use super::report::{Level, Report};
use super::sources::{Named, open};
use crate::policy::prefixes::parse_mac;

#[derive(Debug)]
pub struct Interface {
    pub named: Named,
    pub mac: Option<String>,
    pub group: Option<Reference>,
    pub configurations: Vec<Configuration>,
}

#[derive(Debug)]
pub struct Configuration {
    pub named: Named,
    pub subnet: Option<Reference>,
    pub address: Option<IpAddr>,
    /// Is an IPv6 address wanted where none is given?
    pub v6: bool,
    pub public: Option<Reference>,
    pub application_groups: Vec<Reference>,
    pub pools: Vec<Reference>,
    /// Inbound NAT rules that lead here.
    pub nat_rules: Vec<Reference>,
}

/// Reads an interface.
pub fn read(field: &Field<'_>, mut named: Named, report: &mut Report) -> Option<Interface> {
    let mut object = open(field, &named.title, report)?;
    // Interfaces of a scale set are told apart by its name and the machine's number only.
    if named.id.names.len() > 1 {
        named.name = named.id.names.join("-");
    }
    let mac = object.scalar("macAddress", report).and_then(|(text, place)| match parse_mac(&text) {
        Ok(_) => Some(text),
        Err(complaint) => {
            let why = format!("{}; it is learned from the guest instead", complaint.message);
            report.add(
                Level::Note,
                &place,
                &named.title,
                "macAddress",
                why,
                "write the guest's own address if you know it",
            );
            None
        }
    });
    let group = object.reference("networkSecurityGroup", Level::Error, report);
    let mut configurations = Vec::new();
    for item in object.list("ipConfigurations", Level::Warning, report) {
        configurations.extend(read_configuration(&item, &named, report));
    }
    object.finish(&["interface"], report);
    Some(Interface { named, mac, group, configurations })
}

fn read_configuration(field: &Field<'_>, interface: &Named, report: &mut Report) -> Option<Configuration> {
    let name = field.json.get("name").and_then(|name| name.scalar()).unwrap_or_default();
    let named = interface.part("ipConfigurations", &render(&name), &field.place);
    let mut object = open(field, &named.title, report)?;
    let subnet = object.reference("subnet", Level::Error, report);
    let mut address = None;
    if let Some(given) = object.take("privateIPAddress") {
        address = given.json.scalar().and_then(|text| text.parse().ok());
        if address.is_none() {
            object.wrong(&given, "privateIPAddress", "an address", Level::Note, report);
        }
    }
    let version = object.take("privateIPAddressVersion");
    let v6 =
        version.and_then(|field| field.json.scalar()).is_some_and(|text| text.eq_ignore_ascii_case("IPv6"));
    let public = object.reference("publicIPAddress", Level::Warning, report);
    // A Deny rule may be meant for the members of the group.
    let application_groups = object.references("applicationSecurityGroups", Level::Error, report);
    let pools = object.references("loadBalancerBackendAddressPools", Level::Warning, report);
    let nat_rules = object.references("loadBalancerInboundNatRules", Level::Warning, report);
    object.finish(&["ipConfiguration"], report);
    Some(Configuration { named, subnet, address, v6, public, application_groups, pools, nat_rules })
}
