//! First stage: parse, ARP, the flow look-up. An established packet ends here.

use super::{Context, NO_SLOT, Side, Stage, Verdict, arp, drop, forward, pass};
use crate::env::Env;
use crate::family::{Family, V4};
use crate::flow;
use crate::layout::{Control, DEVICE_GUEST, DEVICE_UPLINK, HOST_DHCP, WORLD};
use crate::packet::Packet;
use crate::packet::headers::{TCP, UDP};
use crate::packet::parse::{
    self, Layer3, SHAPE_FLAGS, SHAPE_FRAGMENT, SHAPE_ICMP_ERROR, SHAPE_ICMP_LINK, SHAPE_OPENS, SHAPE_VLAN,
    Station,
};
use crate::policy::{AT_HOST, AT_PROXY};
use crate::reason::Reason;

/// `ctx.ifindex`, `ctx.hook` and, for the egress of a guest's device, `ctx.side` are set by the caller.
#[inline(always)]
pub fn run<P: Packet, E: Env>(packet: &P, env: &E, ctx: &mut Context) -> Verdict {
    let Some(control) = env.control() else { return Verdict::Pass };
    // SAFETY: the control element lives as long as the map.
    let control = unsafe { &*control };
    // SAFETY: as above; read once, every stage uses this value.
    ctx.generation = unsafe { core::ptr::read_volatile(&raw const control.generation) };
    let Some(pair) = env.device(ctx.ifindex) else { return Verdict::Pass };
    // SAFETY: the pair has two elements and the index is a parity.
    let device = unsafe { &*pair.cast::<crate::layout::Device>().add((ctx.generation & 1) as usize) };
    if device.ifindex != ctx.ifindex {
        // The policy in force does not know this device: what it once was is not ours to say.
        return Verdict::Pass;
    }
    ctx.now = env.now();
    ctx.length = packet.length_at_least();
    if ctx.looped != 0 {
        ctx.side = Side::Uplink as u8;
    } else if ctx.side != Side::Host as u8 {
        ctx.side = match device.kind {
            DEVICE_GUEST => Side::Guest as u8,
            DEVICE_UPLINK => Side::Uplink as u8,
            _ => return Verdict::Pass,
        };
    }
    let side = ctx.side();
    let Some((layer3, station)) = parse::ethernet(packet, ctx) else {
        return if side == Side::Guest {
            drop(env, ctx, Reason::Malformed)
        } else {
            pass(env, ctx, Reason::NotOurs)
        };
    };
    ctx.v6 = 0;
    ctx.again = NO_SLOT;
    if device.apart(station) && ctx.looped == 0 {
        if !station.group() {
            // A switch floods what it does not know, and a device may be promiscuous: somebody else's frame.
            return if side == Side::Uplink {
                pass(env, ctx, Reason::NotOurs)
            } else {
                drop(env, ctx, Reason::NotForUs)
            };
        }
        if side == Side::Uplink && layer3 == Layer3::Ipv4 {
            // What was sent to all is not forwarded (RFC 1812 §5.3.4).
            return pass(env, ctx, Reason::NotOurs);
        }
    }
    // A guest's packet on its way back in is in the world already.
    let network = if ctx.looped != 0 { WORLD } else { device.network };
    if ctx.shape & SHAPE_VLAN != 0 || layer3 != Layer3::Ipv4 {
        ctx.device_mac = device.mac;
        ctx.key.network = network;
        return not_ipv4(packet, env, ctx, layer3, station);
    }
    // As much as the longest IPv4 header and a TCP header need, or all there is.
    let headers = ctx.l3 as u32 + 60 + 20;
    if !packet.pull(if headers < ctx.length { headers } else { ctx.length }) {
        return drop_unless_uplink(env, ctx, Reason::Malformed);
    }
    let parsed = parse::ipv4(packet, ctx);
    ctx.key.network = network;
    if let Err(reason) = parsed {
        if reason == Reason::TcpFlags && side == Side::Uplink {
            ctx.shape |= SHAPE_FLAGS;
            return Verdict::Next(Stage::Classify);
        }
        return drop_unless_uplink(env, ctx, reason);
    }

    if side == Side::Guest && ctx.key.protocol == UDP {
        if ctx.key.source_port == u16::to_be(67) {
            return drop(env, ctx, Reason::DhcpServer);
        }
        if ctx.key.destination_port == u16::to_be(67) && ctx.key.source_port == u16::to_be(68) {
            let settings = &control.settings;
            // SAFETY: two elements, the index is a parity.
            let open =
                unsafe { (*settings.as_ptr().add((ctx.generation & 1) as usize)).host_access } & HOST_DHCP;
            return if open != 0 {
                pass(env, ctx, Reason::ToHost)
            } else {
                drop(env, ctx, Reason::HostAccess)
            };
        }
    }
    if ctx.shape & SHAPE_FRAGMENT != 0 {
        return Verdict::Next(Stage::Fragment);
    }
    if ctx.shape & (SHAPE_ICMP_ERROR | SHAPE_ICMP_LINK) != 0 {
        return Verdict::Next(Stage::Icmp);
    }
    if let Some((index, record)) = flow::find::<V4, E>(env, control, &ctx.key, ctx.now)
        && let Some(verdict) = forward::established::<V4, P, E>(packet, env, ctx, control, index, record)
    {
        return verdict;
    }
    if side == Side::Guest && refused_before::<V4, E>(env, ctx, control) {
        ctx.refused = Reason::SnatRefused as u8;
        return Verdict::Next(Stage::Refuse);
    }
    if side == Side::Uplink {
        let kind = env.endpoint(ctx.generation, WORLD, ctx.key.destination) >> 24 & !AT_PROXY;
        if kind == 0 || kind == AT_HOST {
            return pass(env, ctx, Reason::NotOurs);
        }
    }
    Verdict::Next(Stage::Classify)
}

/// Is it known that the guest has no port for this? Asked before the rules, so that a retried SYN costs next to nothing;
/// what is remembered is a quarter of a second old at most. Of TCP only: a UDP socket may have its port already, whatever the
/// next one was told.
#[inline(always)]
pub(super) fn refused_before<F: Family, E: Env>(env: &E, ctx: &Context, control: &Control) -> bool {
    if ctx.key.protocol != TCP || ctx.shape & SHAPE_OPENS == 0 {
        return false;
    }
    match env.refused(&F::refusal(ctx, &control.seed)) {
        Some(refusal) => refusal.resume == 0 && !crate::clock::passed(refusal.until, ctx.now),
        None => false,
    }
}

/// On an uplink what we cannot read may be for the host: the kernel is the judge of that.
#[inline(always)]
fn drop_unless_uplink<E: Env>(env: &E, ctx: &Context, reason: Reason) -> Verdict {
    if ctx.side == Side::Uplink as u8 { pass(env, ctx, Reason::NotOurs) } else { drop(env, ctx, reason) }
}

#[inline(always)]
fn not_ipv4<P: Packet, E: Env>(
    packet: &P,
    env: &E,
    ctx: &mut Context,
    layer3: Layer3,
    station: Station,
) -> Verdict {
    let tagged = ctx.shape & SHAPE_VLAN != 0;
    match ctx.side() {
        // A tag means another network, or another device stacked on this one.
        Side::Uplink if tagged => pass(env, ctx, Reason::NotOurs),
        _ if tagged => drop(env, ctx, Reason::Vlan),
        _ if layer3 == Layer3::Ipv6 => {
            ctx.v6 = 1;
            Verdict::Next(Stage::Entry6)
        }
        Side::Guest => match layer3 {
            Layer3::Arp => arp::from_guest(packet, env, ctx),
            // Between the port and what is plugged into it: a bridge that must not see these loses its loops' guard.
            _ if station.link_local() => pass(env, ctx, Reason::NotOurs),
            _ => drop(env, ctx, Reason::EtherType),
        },
        Side::Uplink if ctx.looped != 0 => drop(env, ctx, Reason::Internal),
        Side::Uplink => match layer3 {
            Layer3::Arp => arp::from_uplink(packet, env, ctx),
            _ => pass(env, ctx, Reason::NotOurs),
        },
        Side::Host => pass(env, ctx, Reason::FromHost),
    }
}
