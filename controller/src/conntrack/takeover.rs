//! Which of the kernel's connections go on as flows, and what flows they come to: with the very address and port the world
//! knows them by, whoever owns that port now. Policy is asked as if the connection began today.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::net::IpAddr;

use portcullis_common::classify::{entry, header};
use portcullis_common::engine::host::HostEnv;
use portcullis_common::engine::{
    Context, Hook, NO_SLOT, NOBODY, Side, Stage, Verdict, WAY_IN, WAY_INSTANCE_OUT, WAY_SNAT, forward,
    groups, judge, mapping,
};
use portcullis_common::env::Env as _;
use portcullis_common::family::V4;
use portcullis_common::flow::{Ctl, FLAG_FORWARD, FLAG_MAPPED, FLAG_RESET, FLAG_SNAT, LIVE};
use portcullis_common::layout::{
    EPOCH_SHIFT, FLOW_RULE, FlowKey, HalfRecord, IDLE_ICMP, IDLE_TCP, IDLE_UDP, KIND_MAPPING, NEXT_HOP_LOOP,
    Settings, WORLD, hops, v4,
};
use portcullis_common::packet::headers::{SYN, TCP, UDP};
use portcullis_common::packet::parse::SHAPE_OPENS;
use portcullis_common::policy::{
    ALLOC_ECHO, ALLOC_RESET, AT_FRONTEND, AT_GUEST, AT_INSTANCE, AT_LISTENER, AT_PROXY, Endpoint, alloc_of,
};
use portcullis_common::tcp_state;
use serde::{Deserialize, Serialize};

use super::entry::{Connection, Tuple};
use crate::compile::Compiled;
use crate::datapath::{Datapath, FlowWriter, Written, now_tick, whole};

/// `enum tcp_conntrack`: established, and half-closed by either side.
const ALIVE: std::ops::RangeInclusive<u8> = 3..=5;

/// What has been taken over from conntrack.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TakenOver {
    pub tcp: u32,
    pub udp: u32,
    pub icmp: u32,
    /// Guests' translated connections that were not, by reason.
    pub left_out: BTreeMap<String, u32>,
}

impl fmt::Display for TakenOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let TakenOver { tcp, udp, icmp, left_out } = self;
        write!(f, "{tcp} connections of TCP, {udp} of UDP and {icmp} pings taken over from conntrack")?;
        let mut before = "; left out: ";
        for (why, count) in left_out {
            write!(f, "{before}{count} {why}")?;
            before = ", ";
        }
        Ok(())
    }
}

/// A way through the policy for one connection.
struct Judged {
    context: Context,
    /// The half of whoever opened it, and that of the answers: keys, translations, hops.
    halves: [HalfRecord; 2],
    flags: u8,
    mapped: bool,
}

/// Taking over, pass after pass.
pub struct Takeover {
    env: HostEnv,
    settings: Settings,
    writer: FlowWriter,
    /// Network and endpoint of the guests by address.
    guests: HashMap<IpAddr, Vec<(u16, u32)>>,
    generation: u32,
    /// What an earlier pass has dealt with.
    seen: HashSet<Tuple>,
    /// Public address and port of the inside sockets that have got one.
    mapped: HashMap<(u16, u32, u16, u8), (u32, u16)>,
    taken: TakenOver,
}

impl Takeover {
    /// Over a datapath in which `compiled` is in force, and the routes of the world are known.
    ///
    /// # Errors
    /// If the datapath's tables cannot be read or mapped.
    pub fn new(datapath: &Datapath, compiled: &Compiled) -> anyhow::Result<Self> {
        let mut env = HostEnv::new(8, datapath.seed());
        let parity = (compiled.generation & 1) as usize;
        env.control.generation = compiled.generation;
        env.control.settings[parity] = compiled.settings;
        env.set_now(now_tick());
        env.policy[parity] = compiled.host_policy();
        for (index, hop) in datapath.next_hops()? {
            env.set_next_hop(index, hop);
        }
        for route in datapath.routes()? {
            if let IpAddr::V4(address) = route.destination {
                env.routes.insert4(route.prefix_length, address.octets(), route.next_hop);
            }
        }
        let mut guests: HashMap<IpAddr, Vec<(u16, u32)>> = HashMap::new();
        for (key, value) in &compiled.endpoints {
            if value >> 24 == AT_GUEST && key.network != WORLD {
                let address = IpAddr::from(key.address.to_ne_bytes());
                guests.entry(address).or_default().push((key.network, value & 0xff_ffff));
            }
        }
        Ok(Self {
            env,
            settings: compiled.settings,
            writer: datapath.flow_writer()?,
            guests,
            generation: compiled.generation,
            seen: HashSet::new(),
            mapped: HashMap::new(),
            taken: TakenOver::default(),
        })
    }

    /// What has been taken over so far.
    pub fn taken(&self) -> &TakenOver {
        &self.taken
    }

    /// Takes one connection over, if it is one of a guest's, translated, and not dealt with.
    pub fn take(&mut self, connection: &Connection) {
        let Connection { original, reply, .. } = connection;
        let untranslated = (original.source, original.destination) == (reply.destination, reply.source);
        let ports = (original.source_port, original.destination_port);
        // Of a ping the answer's number stands where the request's does not.
        let same_ports = ports == (reply.destination_port, reply.source_port);
        if (untranslated && same_ports) || self.seen.contains(original) {
            return;
        }
        let done = if self.guests.contains_key(&original.source) {
            self.outward(connection)
        } else if self.guests.contains_key(&reply.source) {
            self.inward(connection)
        } else {
            return;
        };
        self.seen.insert(*original);
        match done.and_then(|judged| self.write(original.protocol, judged)) {
            Ok(()) => {
                *match original.protocol {
                    TCP => &mut self.taken.tcp,
                    UDP => &mut self.taken.udp,
                    _ => &mut self.taken.icmp,
                } += 1;
            }
            Err(why) => *self.taken.left_out.entry(why.to_owned()).or_default() += 1,
        }
    }

    /// The one guest with this address.
    fn guest(&self, address: IpAddr) -> Result<(u16, u32), &'static str> {
        match self.guests.get(&address).map(Vec::as_slice) {
            Some([guest]) => Ok(*guest),
            _ => Err("of addresses that several guests have"),
        }
    }

    fn endpoint(&self, number: u32) -> Result<Endpoint, &'static str> {
        let found = header(&self.env, self.generation).and_then(|head| {
            // SAFETY: page 0 is the header.
            let page = unsafe { (*head).endpoints };
            entry::<HostEnv, Endpoint>(&self.env, self.generation, page, number)
        });
        // SAFETY: `entry` points into a page.
        found.map(|endpoint| unsafe { *endpoint }).ok_or("of guests without an endpoint")
    }

    /// Whose public address it is, as [`portcullis_common::policy::endpoint_value`].
    fn public(&self, address: IpAddr) -> (u32, u32) {
        let value = self.env.endpoint(self.generation, WORLD, v4(address));
        (value >> 24 & !AT_PROXY, value & 0xff_ffff)
    }

    fn context(&self, side: Side, tuple: &Tuple, network: u16) -> Context {
        Context {
            key: FlowKey {
                source: v4(tuple.source),
                destination: v4(tuple.destination),
                source_port: tuple.source_port.to_be(),
                destination_port: tuple.destination_port.to_be(),
                network,
                protocol: tuple.protocol,
                ..FlowKey::default()
            },
            now: now_tick(),
            generation: self.generation,
            side: side as u8,
            hook: Hook::Tc as u8,
            shape: SHAPE_OPENS,
            tcp_flags: SYN,
            again: NO_SLOT,
            from: NOBODY,
            to: NOBODY,
            to_network: network,
            ..Context::default()
        }
    }

    /// A guest's connection to the world.
    fn outward(&self, connection: &Connection) -> Result<Judged, &'static str> {
        let Connection { original, reply, .. } = connection;
        alive(connection)?;
        if original.destination != reply.source || original.destination_port != reply.source_port {
            return Err("with both ends translated");
        }
        let (network, number) = self.guest(original.source)?;
        let endpoint = self.endpoint(number)?;
        let (kind, whose) = self.public(reply.destination);
        if kind != AT_FRONTEND && !(kind == AT_INSTANCE && whose == number) {
            return Err("under an address that is not the policy's");
        }
        let mut ctx = self.context(Side::Guest, original, network);
        let hop = self.env.next_hop(u32::from(endpoint.next_hop)).ok_or("of guests that are not here")?;
        // SAFETY: the element lives as long as the table, which is ours alone.
        let hop = unsafe { *hop };
        if hop.ifindex == 0 {
            return Err("of guests that are not here");
        }
        (ctx.ifindex, ctx.source_mac) = (hop.ifindex, hop.mac);
        if judge::run::<V4, HostEnv>(&self.env, &mut ctx) != Verdict::Next(Stage::Claim) {
            return Err("that the policy denies");
        }
        if !matches!(ctx.way, WAY_SNAT | WAY_INSTANCE_OUT) || ctx.egress == NEXT_HOP_LOOP {
            return Err("that the policy does not translate");
        }
        let route = self.env.route(ctx.key.destination) as u16;
        if route == 0 {
            return Err("without a route");
        }
        let alloc = alloc_of(original.protocol).map(|which| (which, endpoint.alloc[which]));
        if let Some((which, alloc)) = alloc
            && which != ALLOC_ECHO
        {
            ctx.idle_class = alloc.idle_class;
            if alloc.flags & ALLOC_RESET != 0 {
                ctx.flow_flags = FLAG_RESET;
            }
        }
        let own = kind == AT_INSTANCE;
        let (public, port) = (v4(reply.destination), reply.destination_port.to_be());
        let key = ctx.key;
        let there = HalfRecord {
            key,
            hops: hops(route, endpoint.next_hop),
            new_source: public,
            new_destination: key.destination,
            // Of a ping the identifier, and the other is 0.
            new_source_port: port,
            new_destination_port: key.destination_port,
            ..HalfRecord::default()
        };
        Ok(Judged {
            halves: [there, answers(&there, WORLD, hops(endpoint.next_hop, route))],
            flags: if own { 0 } else { FLAG_SNAT },
            mapped: !own && original.protocol != TCP,
            context: ctx,
        })
    }

    /// A connection of the world's to a guest, by a port of a public address.
    fn inward(&self, connection: &Connection) -> Result<Judged, &'static str> {
        let Connection { original, reply, .. } = connection;
        alive(connection)?;
        if original.source != reply.destination || original.source_port != reply.destination_port {
            return Err("with both ends translated");
        }
        let (network, number) = self.guest(reply.source)?;
        let endpoint = self.endpoint(number)?;
        let (kind, whose) = self.public(original.destination);
        let mut ctx = self.context(Side::Uplink, original, WORLD);
        let port = original.destination_port.to_be();
        let listener = self.env.listener(self.generation, ctx.key.destination, port, original.protocol) >> 24;
        let open =
            (kind == AT_INSTANCE && whose == number) || (kind == AT_FRONTEND && listener == AT_LISTENER);
        if !open || self.env.space(self.generation, WORLD, ctx.key.source) != 0 {
            return Err("to a port where the policy has nothing");
        }
        let route = self.env.route(ctx.key.source) as u16;
        if route == 0 {
            return Err("without a route");
        }
        ctx.to = number;
        ctx.way = WAY_IN;
        ctx.new.source = ctx.key.source;
        ctx.new.source_port = ctx.key.source_port;
        ctx.new.destination = v4(reply.source);
        ctx.new.destination_port = reply.source_port.to_be();
        let head = header(&self.env, self.generation).ok_or("without a policy")?;
        // SAFETY: page 0 is the header.
        if groups::run::<V4, HostEnv>(&self.env, &mut ctx, unsafe { &*head }).is_err() {
            return Err("that the policy denies");
        }
        let there = HalfRecord {
            key: ctx.key,
            hops: hops(endpoint.next_hop, route),
            new_source: ctx.new.source,
            new_destination: ctx.new.destination,
            new_source_port: ctx.new.source_port,
            new_destination_port: ctx.new.destination_port,
            ..HalfRecord::default()
        };
        let back = answers(&there, network, hops(route, endpoint.next_hop));
        Ok(Judged { halves: [there, back], flags: 0, mapped: false, context: ctx })
    }

    /// Fills in what every flow has, and writes it.
    fn write(&mut self, protocol: u8, judged: Judged) -> Result<(), &'static str> {
        let Judged { context: ctx, halves, mut flags, mapped } = judged;
        let class = match (ctx.idle_class, protocol) {
            (0, TCP) => IDLE_TCP,
            (0, UDP) => IDLE_UDP,
            (0, _) => IDLE_ICMP,
            (class, _) => class,
        };
        let now = now_tick();
        let rule = ctx.rule & FLOW_RULE | self.settings.epoch << EPOCH_SHIFT;
        if mapped && self.map(&halves[0], class, protocol, rule, now) {
            flags |= FLAG_MAPPED;
        }
        flags |= ctx.flow_flags;
        let tcp = if protocol == TCP { tcp_state::OPENED | tcp_state::ANSWERED } else { 0 };
        let deadline = now.wrapping_add(forward::idle(&self.settings, class));
        let finished = |half: HalfRecord, flag: u8| {
            whole(HalfRecord { ctl: Ctl::new(0, LIVE, tcp, class, flags | flag).0, deadline, rule, ..half })
        };
        written(self.writer.write(false, &[finished(halves[0], FLAG_FORWARD), finished(halves[1], 0)], now))
    }

    /// Gives the inside socket its public port, for other destinations too, as a claim does; `false` if it has another
    /// already: the kernel's NAT chooses anew for each destination. The flow keeps its port all the same.
    fn map(&mut self, there: &HalfRecord, class: u8, protocol: u8, rule: u32, now: u32) -> bool {
        let key = there.key;
        let socket = (key.network, key.source, key.source_port, protocol);
        let public = (there.new_source, there.new_source_port);
        if let Some(has) = self.mapped.get(&socket) {
            return *has == public;
        }
        let deadline = mapping::deadline(&self.settings, class, protocol, now);
        let half = HalfRecord { deadline, hops: there.hops, rule, ..HalfRecord::default() };
        let inside = HalfRecord {
            key: FlowKey { destination: 0, destination_port: 0, kind: KIND_MAPPING, ..key },
            ctl: Ctl::new(0, LIVE, 0, class, FLAG_FORWARD | FLAG_SNAT).0,
            new_source: public.0,
            new_source_port: public.1,
            ..half
        };
        let outside = HalfRecord {
            key: FlowKey {
                source: 0,
                destination: public.0,
                source_port: 0,
                destination_port: public.1,
                network: WORLD,
                protocol,
                kind: KIND_MAPPING,
            },
            ctl: Ctl::new(0, LIVE, 0, class, FLAG_SNAT).0,
            new_destination: key.source,
            new_destination_port: key.source_port,
            ..half
        };
        let new = self.writer.write(false, &[whole(inside), whole(outside)], now) == Written::New;
        if new {
            self.mapped.insert(socket, public);
        }
        new
    }
}

/// The half of the answers to `there`, seen in `network`.
fn answers(there: &HalfRecord, network: u16, hops: u32) -> HalfRecord {
    let key = there.key;
    HalfRecord {
        key: FlowKey {
            source: there.new_destination,
            destination: there.new_source,
            source_port: there.new_destination_port,
            destination_port: there.new_source_port,
            network,
            ..key
        },
        hops,
        new_source: key.destination,
        new_destination: key.source,
        new_source_port: key.destination_port,
        new_destination_port: key.source_port,
        ..HalfRecord::default()
    }
}

fn alive(connection: &Connection) -> Result<(), &'static str> {
    let opening_or_over = connection.tcp_state.is_some_and(|state| !ALIVE.contains(&state));
    if opening_or_over { Err("that were opening or ending") } else { Ok(()) }
}

fn written(written: Written) -> Result<(), &'static str> {
    match written {
        Written::New => Ok(()),
        Written::Exists => Err("whose port is in use towards the same destination"),
        Written::Full => Err("for want of room in the flow table"),
    }
}
