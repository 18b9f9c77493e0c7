//! Quotas without packets: what the claim asks of them, on the host's tables.

use std::vec;

use super::*;
use crate::engine::Stage;
use crate::engine::host::HostEnv;
use crate::flow::{Body, Taken, find, insert, publish};
use crate::layout::{FlowKey, hops};
use crate::policy::Page;

const QUOTA: u32 = 64;
const GUEST: u16 = 5;
const ROUTER: u16 = 9;

/// Tables with so many buckets, and a policy that is nothing but the quota.
fn tables(buckets: u32) -> HostEnv {
    let mut env = HostEnv::new(buckets, [3, 5]);
    let mut page = Page::default();
    let header = crate::policy::Header { flow_quota: [QUOTA, QUOTA], ..Default::default() };
    // SAFETY: the header fits a page, which is aligned to eight.
    unsafe { (&raw mut page).cast::<crate::policy::Header>().write(header) };
    env.policy[0].pages = vec![page];
    env
}

fn key(network: u16, port: u16) -> FlowKey {
    FlowKey { source: 1, destination: 2, source_port: port, network, protocol: TCP, ..FlowKey::default() }
}

/// Opens a flow as the claim does; its last verdict if it is refused.
fn open(env: &HostEnv, network: u16, port: u16) -> Result<Taken, Verdict> {
    let mut ctx = Context { now: env.now(), key: key(network, port), ..Context::default() };
    let world = network == WORLD;
    (ctx.ingress, ctx.egress) = if world { (ROUTER, GUEST) } else { (GUEST, ROUTER) };
    while let Some(verdict) = admit::<V4, _>(env, &mut ctx) {
        if verdict != Verdict::Next(Stage::Relieve) {
            return Err(verdict);
        }
        assert_eq!(relieve(env, &mut ctx), Verdict::Next(Stage::Claim));
    }
    let mut notes = 0;
    // SAFETY: a word of our own.
    let taken = unsafe { insert::<V4, _>(env, &ctx.key, env.now(), &raw mut notes) };
    assert!(taken.is_slot(), "{taken:?}");
    let body = Body {
        peer: taken.index(),
        deadline: env.now() + 100,
        hops: hops(ctx.egress, ctx.ingress),
        ..Body::default()
    };
    publish::<V4, _>(
        env,
        taken,
        &body,
        Ctl::new(taken.generation(), LIVE, tcp_state::OPENED, 0, FLAG_FORWARD),
    );
    enter::<V4, _>(env, &ctx, &env.control, taken.index(), taken.generation());
    Ok(taken)
}

fn lives(env: &HostEnv, network: u16, port: u16) -> bool {
    find::<V4, _>(env, &env.control, &key(network, port), env.now()).is_some()
}

/// Flows held, places in the ring, refused, replaced.
fn has(env: &HostEnv) -> [i64; 4] {
    // SAFETY: an element of the table, which nobody writes now.
    let guest = unsafe { *env.guest_flows(GUEST.into()).unwrap() };
    [held(guest.held).into(), guest.waiting as i64, guest.refused as i64, guest.replaced as i64]
}

#[test]
fn a_guest_has_its_quota_and_dead_flows_make_room_one_by_one() {
    let env = tables(1024);
    for port in 0..64 {
        open(&env, 1, port).unwrap();
    }
    assert_eq!(open(&env, 1, 64), Err(Verdict::Drop));
    assert_eq!(has(&env), [64, 0, 1, 0]);
    assert_eq!(env.counters(), [(Reason::GuestFlowQuota, 1)]);
    env.set_now(env.now() + 3600 * 15);
    for port in 100..164 {
        open(&env, 1, port).unwrap();
        assert!(has(&env)[0] <= 64);
    }
    assert_eq!(open(&env, 1, 164), Err(Verdict::Drop), "these live");
    assert_eq!(has(&env), [64, 0, 2, 0]);
}

#[test]
fn of_half_open_flows_the_oldest_goes_first_and_one_that_was_acknowledged_never() {
    let env = tables(1024);
    for port in 0..100 {
        let taken = open(&env, WORLD, port).unwrap();
        if port < 4 {
            let r = flow::record::<V4, _>(&env, taken.index()).unwrap();
            // SAFETY: it points into the table, which nobody else uses now.
            unsafe {
                (*r).ctl = flow::ctl(r).with_tcp(tcp_state::OPENED | tcp_state::ANSWERED).0;
                (*r).ack = 7;
            }
        }
    }
    let alive: std::vec::Vec<u16> = (0..100).filter(|port| lives(&env, WORLD, *port)).collect();
    assert_eq!(alive, [0, 1, 2, 3, 92, 93, 94, 95, 96, 97, 98, 99]);
    assert_eq!(has(&env), [12, 8, 0, 88]);
}

#[test]
fn the_ring_bounds_the_half_open_flows_of_all() {
    // A ring of four places, fewer than the guest's eight.
    let env = tables(16);
    for port in 0..30 {
        open(&env, WORLD, port).unwrap();
    }
    let alive: std::vec::Vec<u16> = (0..30).filter(|port| lives(&env, WORLD, *port)).collect();
    assert_eq!(alive, [26, 27, 28, 29]);
    assert_eq!(has(&env), [4, 4, 0, 26]);
}
