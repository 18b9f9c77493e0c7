//! Other firewalls on this host, which redirected packets will not meet. For a warning in `status`, no more.

use std::fs;
use std::io::ErrorKind;
use std::process::{Command, Stdio};

use serde::Deserialize;

use super::Links;

/// One firewall and how it was noticed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Firewall {
    /// `ufw`, `Docker`, `firewalld`, `nftables`, `iptables`.
    pub name: &'static str,
    pub evidence: String,
}

/// What seems to be there. A heuristic: nothing found proves nothing, and no tool missing is an error.
///
/// Runs `nft -j list tables` when it is installed, in the calling thread's network namespace.
pub fn firewalls(links: &Links) -> Vec<Firewall> {
    let mut found = Vec::new();
    let mut add = |name, evidence: String| found.push(Firewall { name, evidence });
    if fs::read_to_string("/etc/ufw/ufw.conf").is_ok_and(|text| ufw_is_on(&text)) {
        add("ufw", "ENABLED=yes in /etc/ufw/ufw.conf".into());
    }
    if links.get("docker0").is_some() {
        add("Docker", "device docker0".into());
    }
    let tables = nft_tables();
    if tables.iter().any(|table| table.ends_with(" firewalld")) {
        add("firewalld", "nftables table firewalld".into());
    }
    let others: Vec<&str> =
        tables.iter().map(String::as_str).filter(|table| !table.ends_with(" firewalld")).collect();
    if !others.is_empty() {
        add("nftables", format!("tables {}", others.join(", ")));
    }
    // Old iptables does not show in nft; the file exists once its module is loaded.
    if let Ok(names) = fs::read_to_string("/proc/net/ip_tables_names") {
        let names: Vec<&str> = names.split_whitespace().collect();
        if !names.is_empty() {
            add("iptables", format!("tables {}", names.join(", ")));
        }
    }
    found
}

fn ufw_is_on(text: &str) -> bool {
    text.lines().any(|line| line.trim().eq_ignore_ascii_case("ENABLED=yes"))
}

fn nft_tables() -> Vec<String> {
    let output = Command::new("nft")
        .args(["-j", "list", "tables"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    match output {
        Ok(output) if output.status.success() => tables_in(&output.stdout),
        Ok(_) => Vec::new(),
        Err(error) => {
            if error.kind() != ErrorKind::NotFound {
                log::debug!("cannot run nft to look for other firewalls: {error}");
            }
            Vec::new()
        }
    }
}

/// "family name" of each table in nft's JSON.
fn tables_in(json: &[u8]) -> Vec<String> {
    #[derive(Deserialize)]
    struct Listing {
        nftables: Vec<Entry>,
    }
    #[derive(Deserialize)]
    struct Entry {
        table: Option<Table>,
    }
    #[derive(Deserialize)]
    struct Table {
        family: String,
        name: String,
    }
    let Ok(listing) = serde_json::from_slice::<Listing>(json) else {
        return Vec::new();
    };
    let tables = listing.nftables.into_iter().filter_map(|entry| entry.table);
    tables.map(|table| format!("{} {}", table.family, table.name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosts::Host;
    use crate::hosts::testing::{Lab, needs_root};

    #[test]
    fn tables_are_read_from_what_nft_prints() {
        let json = br#"{"nftables": [{"metainfo": {"version": "1.0.6"}},
            {"table": {"family": "inet", "name": "firewalld", "handle": 1}},
            {"table": {"family": "ip", "name": "filter", "handle": 2}}]}"#;
        assert_eq!(tables_in(json), ["inet firewalld", "ip filter"]);
        assert!(tables_in(b"nonsense").is_empty());
        assert!(ufw_is_on("# x\nENABLED=yes\n") && !ufw_is_on("ENABLED=no"));
    }

    #[test]
    fn docker_is_noticed_by_its_bridge() {
        if !needs_root() {
            return;
        }
        let lab = Lab::new();
        lab.ip(&["link", "add", "docker0", "type", "bridge"]);
        let found = lab.run(|| async { firewalls(&Host::open().unwrap().links().await.unwrap()) });
        assert!(found.iter().any(|firewall| firewall.name == "Docker"), "{found:?}");
    }
}
