//! `snat` for people.

use super::snat::SnatUse;
use super::snat_views::{ByDestination, PortHolders};
use crate::cli::table::Table;

impl SnatUse {
    /// For people: a line for each guest, address and protocol, sums, and who has no ports, with the reason.
    pub fn text(&self) -> String {
        let mut table = Table::new(&[
            "GUEST",
            "FRONTEND",
            "PROTO",
            "ALLOCATED>",
            "USED>",
            "HOLDING>",
            "FREE>",
            "DRAINING>",
            "MOST TOWARDS ONE DESTINATION",
        ]);
        for guest in &self.guests {
            for on in &guest.ports {
                let draining = match (on.draining, on.draining_flows) {
                    (0, 0) => "0".to_owned(),
                    (ports, flows) => format!("{ports} ({flows} flows)"),
                };
                let busiest = on.busiest.as_ref();
                table.row([
                    guest.guest.clone(),
                    on.frontend.clone(),
                    on.protocol.clone(),
                    on.allocated.to_string(),
                    on.used.to_string(),
                    on.holding.to_string(),
                    on.free.to_string(),
                    draining,
                    busiest.map_or_else(String::new, |to| format!("{} to {}", to.ports, to.destination)),
                ]);
            }
        }
        for total in &self.totals {
            table.row([
                "total".to_owned(),
                String::new(),
                total.protocol.clone(),
                total.allocated.to_string(),
                total.used.to_string(),
                total.holding.to_string(),
                total.free.to_string(),
                total.draining.to_string(),
            ]);
        }
        let mut text = table.render("no guest has SNAT ports");
        for guest in &self.guests {
            if let Some(because) = &guest.no_data_because {
                text += &format!("{}: no data because {because}\n", guest.guest);
            }
            let untils: Vec<&String> =
                guest.ports.iter().filter_map(|on| on.draining_until.as_ref()).collect();
            if let Some(until) = untils.iter().max() {
                text += &format!("{}: flows on draining ports may go on until {until}\n", guest.guest);
            }
            if guest.exhausted_sampled > 0 {
                let (name, count) = (&guest.guest, guest.exhausted_sampled);
                text += &format!("{name}: at least {count} packets dropped for want of a port\n");
            }
        }
        if self.exhausted_packets > 0 {
            text +=
                &format!("{} packets dropped because their guest had no port left\n", self.exhausted_packets);
        }
        text
    }
}

impl ByDestination {
    /// For people.
    pub fn text(&self) -> String {
        let mut table = Table::new(&["GUEST", "DESTINATION", "PROTO", "PORTS>", "OF>", "SHARE>"]);
        for row in &self.destinations {
            table.row([
                row.guest.clone(),
                row.destination.clone(),
                row.protocol.clone(),
                row.ports.to_string(),
                row.of.to_string(),
                format!("{:.1} %", row.share_percent),
            ]);
        }
        let mut text = table.render("no guest has a port in use");
        if self.total > self.destinations.len() {
            text += &format!(
                "{} of {} destinations, those with the largest share; --limit shows more\n",
                self.destinations.len(),
                self.total
            );
        }
        text
    }
}

impl PortHolders {
    /// For people.
    pub fn text(&self) -> String {
        let mut text = String::new();
        for holder in &self.holders {
            text += &format!("{}/{}: {}\n", self.port, holder.protocol, holder.text);
        }
        if self.flows.is_empty() {
            text += "no live flow has it\n";
        } else {
            text += &super::list::table(&self.flows).render("");
        }
        text
    }
}
