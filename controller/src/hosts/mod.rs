//! This host, as the gateway sees it: devices, addresses, routes, neighbours, sysctls and offloads, by netlink.
//!
//! The datapath needs two things from here: where the world is (routes and neighbours of the uplinks, mirrored
//! into its tables) and what the guests' devices are (`choose_hooks`). Nothing in here ever sets a forwarding
//! sysctl: TC resolves with `bpf_redirect_neigh`, XDP uses the mirrored address while it is fresh (design §4).
//!
//! What *is* changed on the host (`prepare`) goes through the `Journal` first, so that `portcullis down` can put
//! it back even when the controller was killed half way (design §1, promise 5).

mod addresses;
mod ethtool;
mod firewalls;
mod guest_routes;
mod hooks;
mod jit;
mod journal;
mod links;
mod namespace;
mod neighbours;
mod netlink;
mod offloads;
mod prepare;
mod probers;
mod routes;
mod rules;
mod solicited;
mod sysctl;
mod undo;
mod watch;
mod wishes;
mod xdp_features;

#[cfg(test)]
pub(crate) mod testing;

pub use addresses::HostAddress;
pub use firewalls::{Firewall, firewalls};
pub use hooks::{
    AttachedHook, DeviceChoice, DeviceRole, choose_hooks, choose_hooks_without, missing_devices,
};
pub use jit::jit_warnings;
pub use journal::{HostChange, Journal};
pub use links::{Link, LinkKind, Links, Peer};
pub use neighbours::{Neighbour, Resolution};
pub use netlink::Host;
pub use offloads::{DeviceFeatures, features};
pub use prepare::{Prepared, prepare, unprepare_stale};
pub use routes::{Elsewhere, Route, Routes};
pub use solicited::Solicited;
pub use sysctl::{Ranges, ephemeral_range, reserved_ports};
pub use undo::UndoReport;
pub use watch::{HostEvent, Watch};
pub use wishes::{Wishes, wishes};
pub use xdp_features::XdpFeatures;
