//! Public addresses and prefixes as the input has them.

use std::net::IpAddr;

use ipnet::IpNet;

use super::networks;
use super::object::Field;
use super::report::{Level, Report};
use super::sources::{Named, open};

#[derive(Debug)]
pub struct Public {
    pub named: Named,
    pub address: Option<IpAddr>,
    pub v6: bool,
}

#[derive(Debug)]
pub struct Prefix {
    pub named: Named,
    pub prefix: Option<IpNet>,
}

/// Azure's default, which is ours too.
const IDLE_MINUTES: &str = "4";

/// Reads a public address.
pub fn read(field: &Field<'_>, named: Named, report: &mut Report) -> Option<Public> {
    let mut object = open(field, &named.title, report)?;
    let mut address = None;
    if let Some(given) = object.take("ipAddress") {
        address = given.json.scalar().and_then(|text| text.parse().ok());
        if address.is_none() {
            object.wrong(&given, "ipAddress", "an address", Level::Note, report);
        }
    }
    let version = object.take("publicIPAddressVersion").and_then(|field| field.json.scalar());
    let v6 = version.is_some_and(|text| text.eq_ignore_ascii_case("IPv6"));
    if let Some((minutes, place)) = object.scalar("idleTimeoutInMinutes", report)
        && minutes != IDLE_MINUTES
    {
        let why = "an address of its own has no timeout of its own here";
        let action = "set `tcpEstablishedSeconds` and `udpSeconds` under `timeouts`, for all flows";
        report.add(Level::Warning, &place, &named.title, "idleTimeoutInMinutes", why, action);
    }
    object.finish(&["public"], report);
    Some(Public { named, address, v6 })
}

/// Reads a public prefix.
pub fn read_prefix(field: &Field<'_>, named: Named, report: &mut Report) -> Option<Prefix> {
    let mut object = open(field, &named.title, report)?;
    let prefix = networks::prefixes(&mut object, &["ipPrefix"], Level::Warning, report).into_iter().next();
    object.finish(&["prefix"], report);
    Some(Prefix { named, prefix })
}
