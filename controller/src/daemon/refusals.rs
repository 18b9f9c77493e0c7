//! Drivers that refuse our XDP program: told from other errors of an attachment, so that the device can stay with TC
//! where the policy leaves the choice to us.

use std::collections::BTreeMap;

use super::plan::Plan;
use crate::hosts::AttachedHook;
use crate::policy::{Loaded, network};

/// The device whose driver refused the XDP program, if the policy leaves the hook to us.
pub fn refused_xdp(
    error: &anyhow::Error,
    plan: &Plan,
    loaded: &Loaded,
    refused: &BTreeMap<String, String>,
) -> Option<String> {
    let xdp = plan.choices.iter().filter(|choice| choice.hook == AttachedHook::Xdp);
    let mut names = xdp.map(|choice| &choice.name).filter(|name| !refused.contains_key(*name));
    names.find(|name| names_xdp_on(error, name) && wants_auto(loaded, name)).cloned()
}

/// Is this the datapath's error about XDP on that device?
pub fn names_xdp_on(error: &anyhow::Error, device: &str) -> bool {
    let text = format!("attaching pc_xdp on {device} (xdp)");
    error.chain().any(|cause| cause.to_string() == text)
}

/// Does everything on this device leave the hook to us?
pub fn wants_auto(loaded: &Loaded, device: &str) -> bool {
    let uplinks =
        loaded.network.uplinks.iter().filter(|uplink| uplink.device == device).map(|uplink| uplink.hook);
    let guests = loaded
        .network
        .interfaces
        .iter()
        .filter(|interface| interface.device == device)
        .map(|interface| interface.hook);
    uplinks.chain(guests).all(|hook| hook == network::Hook::Auto)
}
