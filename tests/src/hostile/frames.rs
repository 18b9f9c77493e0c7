//! Packets: a sequence of frames on any device, of any length, under either hook, with the clock moved in between.
//!
//! The bytes are steps: one that says what (see [`step`]), and for a frame its length in two bytes (little endian) and itself.

use std::net::IpAddr;
use std::sync::OnceLock;

use portcullis_common::engine::{Hook, Verdict};

use crate::backend::{Gateway, host_env};
use crate::icmp_error::{POLICY, fix_header};
use crate::lab::{Checksum, Frame};

const DEVICES: [&str; 4] = ["vm1", "vm2", "vm3", "up"];
/// Frames of one sequence; more only make it slow.
const MAX_STEPS: usize = 64;

/// What a step's first byte says.
pub mod step {
    /// The device the frame is on, of vm1, vm2, vm3 and the uplink.
    pub const DEVICE: u8 = 3;
    /// Under XDP, else under TC.
    pub const XDP: u8 = 4;
    /// Sent by the host to the guest's device; on the uplink shown to the guard.
    pub const EGRESS: u8 = 8;
    /// The IPv4 header's checksum is put right first.
    pub const FIX: u8 = 16;
    /// No frame: the two bytes are ticks that the clock moves on.
    pub const CLOCK: u8 = 32;
}

/// Runs the steps on the host engine with a policy of all kinds of translation.
///
/// # Panics
/// If the engine does; if it touches a packet that it leaves to the kernel; if a private source leaves by the uplink; if a
/// checksum that was right is wrong afterwards.
pub fn frames(bytes: &[u8]) {
    let gateway = gateway();
    let env = host_env(gateway, 1 << 6);
    let mut now = 1000u32;
    let mut rest = bytes;
    for _ in 0..MAX_STEPS {
        let [what, low, high, behind @ ..] = rest else { return };
        let number = u16::from_le_bytes([*low, *high]);
        if what & step::CLOCK != 0 {
            now = now.wrapping_add(u32::from(number));
            env.set_now(now);
            rest = behind;
            continue;
        }
        let (frame, behind) = behind.split_at(usize::from(number).min(behind.len()));
        rest = behind;
        let mut frame = frame.to_vec();
        if what & step::FIX != 0 {
            fix(&mut frame);
        }
        let device = usize::from(what & step::DEVICE);
        let ifindex = gateway.devices[DEVICES[device]].ifindex;
        if what & step::EGRESS != 0 && device == 3 {
            let verdict = env.guard(&frame);
            assert!(matches!(verdict, Verdict::Pass | Verdict::Drop), "the guard says {verdict:?}");
            continue;
        }
        let hook = if what & step::XDP != 0 && what & step::EGRESS == 0 { Hook::Xdp } else { Hook::Tc };
        let (verdict, out, _) = env.packet(&frame, ifindex, hook, what & step::EGRESS != 0);
        judge(gateway, &frame, verdict, out, hook);
    }
}

fn gateway() -> &'static Gateway {
    static GATEWAY: OnceLock<Gateway> = OnceLock::new();
    GATEWAY.get_or_init(|| {
        let number = |name: &str| DEVICES.iter().position(|d| *d == name).map(|at| 10 + at as u32);
        Gateway::compile(POLICY, number).expect("the policy is in order")
    })
}

fn fix(frame: &mut [u8]) {
    let Some(first) = frame.get(14) else { return };
    let length = usize::from(first & 15) * 4;
    if first >> 4 == 4 && length >= 20 && frame.len() >= 14 + length {
        fix_header(frame, 14);
    }
}

fn judge(gateway: &Gateway, frame: &[u8], verdict: Verdict, out: Vec<u8>, hook: Hook) {
    let to = match verdict {
        Verdict::Drop => return,
        Verdict::Pass => {
            assert!(out == frame, "left to the kernel, but touched: {frame:02x?} is {out:02x?}");
            return;
        }
        Verdict::Redirect(to) | Verdict::Neighbour(to, _) | Verdict::Neighbour6(to) => to,
        Verdict::Next(stage) => panic!("stopped before {stage:?}"),
    };
    assert!(hook == Hook::Tc || matches!(verdict, Verdict::Redirect(_)), "{verdict:?} under XDP");
    assert!(gateway.devices.values().any(|device| device.ifindex == to), "sent out of no device: {to}");
    let (before, after) = (Frame::parse(frame.to_vec()), Frame::parse(out));
    let (is, was) = (after.checksums(), before.checksums());
    if to == gateway.devices[&gateway.uplink].ifindex
        && let Some(ip) = &after.ip
    {
        assert!(!private(ip.source), "a private source leaves: {after:?}, was {before:?}");
    }
    // An answer of the gateway's own has other checksums, but right ones too.
    if was.header == Checksum::Good {
        assert_ne!(is.header, Checksum::Bad, "{after:?}, was {before:?}");
        if was.transport == Checksum::Good {
            assert_ne!(is.transport, Checksum::Bad, "{after:?}, was {before:?}");
        }
    }
}

fn private(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.octets()[0] == 10,
        IpAddr::V6(address) => address.segments()[0] == 0xfd00,
    }
}
