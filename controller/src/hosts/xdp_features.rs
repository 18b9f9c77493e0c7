//! Which XDP operations each device's driver offers, from the kernel itself (`netdev` generic netlink, since 6.3).
//!
//! For a veth the kernel even knows whether a frame redirected into it would arrive: `NDO_XMIT` appears once its
//! peer has NAPI, by GRO or by an XDP program (measured on 6.18, both ends up: 0x23 without, 0x67 with `gro on` at
//! the peer).

use std::collections::HashMap;

use anyhow::{Context, Result, bail};
use rtnetlink::packet_core::{NlaBuffer, NlasIterator};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_GENERIC};

/// `enum netdev_xdp_act` of a device (include/uapi/linux/netdev.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct XdpFeatures(pub u64);

impl XdpFeatures {
    const BASIC: u64 = 1;
    const REDIRECT: u64 = 2;
    const NDO_XMIT: u64 = 4;

    /// The driver runs XDP programs and can redirect from them: what the datapath needs on the receiving side.
    pub fn receives(self) -> bool {
        self.0 & (Self::BASIC | Self::REDIRECT) == Self::BASIC | Self::REDIRECT
    }

    /// Frames redirected into the device are sent. Many NICs say so only once a program is attached to them.
    pub fn transmits(self) -> bool {
        self.0 & Self::NDO_XMIT != 0
    }
}

// include/uapi/linux/genetlink.h and netdev.h.
const GENL_ID_CTRL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;

const NLM_F_REQUEST: u16 = 1;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// Header of a netlink message and of a generic netlink message, in bytes.
const HEADER: usize = 16 + 4;

/// By ifindex, for all devices of the calling thread's namespace. `None` when this kernel does not tell (before
/// 6.3); errors are those of the socket.
pub(super) fn xdp_features() -> Result<Option<HashMap<u32, XdpFeatures>>> {
    let mut socket = Socket::new(NETLINK_GENERIC).context("cannot open a generic netlink socket")?;
    socket.bind_auto().context("cannot bind a generic netlink socket")?;

    let name = attribute(CTRL_ATTR_FAMILY_NAME, b"netdev\0");
    let Some(replies) = ask(&socket, GENL_ID_CTRL, NLM_F_REQUEST, CTRL_CMD_GETFAMILY, &name)? else {
        return Ok(None);
    };
    let Some(family) = replies
        .iter()
        .find_map(|reply| find(reply, CTRL_ATTR_FAMILY_ID))
        .and_then(|value| Some(u16::from_ne_bytes(value.try_into().ok()?)))
    else {
        return Ok(None);
    };

    let Some(devices) = ask(&socket, family, NLM_F_REQUEST | NLM_F_DUMP, NETDEV_CMD_DEV_GET, &[])? else {
        return Ok(None);
    };
    let entry = |device: &Vec<u8>| {
        let ifindex = u32::from_ne_bytes(find(device, NETDEV_A_DEV_IFINDEX)?.try_into().ok()?);
        let features = u64::from_ne_bytes(find(device, NETDEV_A_DEV_XDP_FEATURES)?.try_into().ok()?);
        Some((ifindex, XdpFeatures(features)))
    };
    Ok(Some(devices.iter().filter_map(entry).collect()))
}

/// Sends one request and returns the attribute bytes of each answer; `None` when the kernel refuses it, which is
/// how an older one says that it does not know the family.
fn ask(
    socket: &Socket,
    family: u16,
    flags: u16,
    command: u8,
    attributes: &[u8],
) -> Result<Option<Vec<Vec<u8>>>> {
    let length = HEADER + attributes.len();
    let mut request = Vec::with_capacity(length);
    request.extend_from_slice(&(length as u32).to_ne_bytes());
    request.extend_from_slice(&family.to_ne_bytes());
    request.extend_from_slice(&flags.to_ne_bytes());
    request.extend_from_slice(&1u32.to_ne_bytes()); // sequence
    request.extend_from_slice(&0u32.to_ne_bytes()); // port, filled in by the kernel
    request.extend_from_slice(&[command, 1, 0, 0]);
    request.extend_from_slice(attributes);
    socket.send_to(&request, &SocketAddr::new(0, 0), 0).context("cannot ask the kernel for XDP features")?;

    let mut answers = Vec::new();
    loop {
        let (datagram, _) = socket.recv_from_full().context("no answer about XDP features")?;
        let mut rest = datagram.as_slice();
        while rest.len() >= 16 {
            let length = u32::from_ne_bytes(rest[0..4].try_into()?) as usize;
            let kind = u16::from_ne_bytes(rest[4..6].try_into()?);
            if length < 16 || length > rest.len() {
                bail!(
                    "the kernel's answer about XDP features is cut short ({length} of {} bytes)",
                    rest.len()
                );
            }
            match kind {
                NLMSG_DONE => return Ok(Some(answers)),
                NLMSG_ERROR => return Ok(None),
                _ if length >= HEADER => answers.push(rest[HEADER..length].to_vec()),
                _ => {}
            }
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        }
        if flags & NLM_F_DUMP == 0 {
            return Ok(Some(answers));
        }
    }
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity((4 + value.len()).next_multiple_of(4));
    bytes.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn find(attributes: &[u8], kind: u16) -> Option<Vec<u8>> {
    NlasIterator::new(attributes)
        .filter_map(|nla: Result<NlaBuffer<&[u8]>, _>| nla.ok())
        .find(|nla| nla.kind() == kind)
        .map(|nla| nla.value().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hosts::testing::{Lab, needs_root};

    #[test]
    fn the_kernel_says_whether_a_redirect_into_a_veth_would_arrive() {
        if !needs_root() {
            return;
        }
        let lab = Lab::new();
        let guest = Lab::new();
        lab.ip(&["link", "add", "v0", "type", "veth", "peer", "name", "v1", "netns", guest.name()]);
        guest.ip(&["link", "set", "v1", "up"]);
        lab.ip(&["link", "set", "v0", "up"]);
        let (ifindex, before) = lab.run(|| async {
            let host = crate::hosts::Host::open().unwrap();
            let links = host.links().await.unwrap();
            let v0 = links.get("v0").unwrap();
            (v0.ifindex, v0.xdp)
        });
        let Some(before) = before else {
            return; // a kernel before 6.3
        };
        assert!(before.receives());
        assert!(!before.transmits());
        guest.run(|| async { crate::hosts::ethtool::set_feature("v1", "rx-gro", true).unwrap() });
        let after = lab.run(move || async move { xdp_features().unwrap().unwrap()[&ifindex] });
        assert!(after.transmits());
    }
}
