//! The packet through the engine, stage by stage. A guest's packet to one of our own public addresses passes it twice: out
//! as to the world, and in again as from there; both passes are kept, to be told.

use std::net::IpAddr;

use portcullis_common::Reason;
use portcullis_common::engine::host::{HostEnv, HostPacket};
use portcullis_common::engine::{self, Context, Hook, Side, Stage, Verdict};
use portcullis_common::layout::WORLD;

use super::ends::{Ends, Sender};
use crate::datapath::address6;
use crate::flows::address;

/// What the engine said.
pub struct Said {
    /// As [`super::Explanation::verdict`].
    pub verdict: &'static str,
    pub reason: Reason,
    /// Of the last pass.
    pub context: Context,
    /// Of the way out, if the packet came back in.
    pub out: Option<Context>,
}

/// Runs the packet.
pub fn run(env: &HostEnv, frame: &[u8], ends: &Ends<'_>, from_host: bool) -> Said {
    let packet = HostPacket::new(frame);
    let mut context = Context {
        ifindex: ends.ifindex,
        hook: Hook::Tc as u8,
        side: if from_host { Side::Host as u8 } else { 0 },
        ..Context::default()
    };
    let mut out = None;
    let mut stage = Stage::Entry;
    let verdict = loop {
        match engine::run(stage, &packet, env, &mut context) {
            Verdict::Next(next) => {
                if next == Stage::Loop {
                    out = Some(context);
                }
                stage = next;
            }
            verdict => break verdict,
        }
    };
    let counters = env.counters();
    let reason = counters.iter().find(|(reason, _)| reason.is_drop()).or(counters.first());
    let reason = reason.map_or(Reason::NotOurs, |(reason, _)| *reason);
    let verdict = match verdict {
        Verdict::Drop => "drop",
        Verdict::Redirect(_) | Verdict::Neighbour(..) | Verdict::Neighbour6(_) => "forward",
        Verdict::Pass | Verdict::Next(_) if from_host => "forward",
        Verdict::Pass | Verdict::Next(_) => "host",
    };
    Said { verdict, reason, context, out }
}

/// Source and destination after translation, with their ports in native order.
pub fn translated(context: &Context) -> [(IpAddr, u16); 2] {
    let new = &context.new;
    let [source, destination] = if context.v6 == 0 {
        [new.source, new.destination].map(|a| IpAddr::V4(address(a)))
    } else {
        [context.new6.source, context.new6.destination].map(|a| IpAddr::V6(address6(a)))
    };
    [(source, u16::from_be(new.source_port)), (destination, u16::from_be(new.destination_port))]
}

/// The packet as it comes back in: from the world, under its public address.
pub fn come_back<'a>(ends: &Ends<'_>, out: &Context) -> Ends<'a> {
    let [(source, port), _] = translated(out);
    Ends {
        from: Sender::World,
        source,
        source_port: port,
        destination: ends.destination,
        destination_port: ends.destination_port,
        protocol: ends.protocol,
        ifindex: ends.ifindex,
        missing_device: None,
        network: WORLD,
    }
}
