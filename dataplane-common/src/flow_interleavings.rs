//! The flow table under every order of its accesses that shuttle comes up with: threads that insert, publish, find, end and take
//! over, switched before each access to a record (`atomic::step`). What two real processors do to it is in `tests/tests/claims.rs`.

use core::cell::Cell;
use std::sync::Arc;
use std::vec::Vec;

use shuttle::thread;

use crate::atomic;
use crate::clock::{self, GRACE};
use crate::engine::Context;
use crate::engine::host::HostEnv;
use crate::env::Env as _;
use crate::family::V4;
use crate::flow::{
    self, BUSY, Body, Ctl, FLAG_FORWARD, FREE, Grace, LIVE, Taken, find, insert, publish, record, withdraw,
};
use crate::layout::{BUCKET_SLOTS, FlowKey, KIND_FLOW, WORLD, hops};
use crate::quota;

const SCHEDULES: usize = 20_000;
const TCP: u8 = 6;

std::thread_local! {
    static SWITCHING: Cell<bool> = const { Cell::new(false) };
}

/// See [`crate::atomic::step`]. Other tests of this crate have no scheduler to ask.
pub fn step() {
    if SWITCHING.get() {
        thread::yield_now();
    }
}

/// A table of one bucket: all keys meet there.
fn table() -> Arc<HostEnv> {
    Arc::new(HostEnv::new(1, [3, 5]))
}

fn key(port: u16) -> FlowKey {
    FlowKey {
        source: 1,
        destination: 2,
        source_port: port,
        destination_port: 80,
        network: 1,
        protocol: TCP,
        kind: KIND_FLOW,
    }
}

fn take(env: &HostEnv, port: u16) -> Taken {
    take_with(env, port, Grace::Kept)
}

fn take_with(env: &HostEnv, port: u16, grace: Grace) -> Taken {
    let mut notes = 0;
    // SAFETY: a word of our own.
    unsafe { insert::<V4, _>(env, &key(port), env.now(), grace, &raw mut notes) }
}

/// Publishes a flow whose every field says whose it is.
fn tell(env: &HostEnv, taken: Taken, mark: u16) {
    let body = Body {
        peer: taken.index(),
        deadline: env.now() + 100,
        new_source: u32::from(mark),
        new_source_port: mark,
        rule: u32::from(mark),
        ..Body::default()
    };
    publish::<V4, _>(env, taken, &body, Ctl::new(taken.generation(), LIVE, 0, 0, FLAG_FORWARD));
}

/// Records by phase and key, when nobody else works.
fn records(env: &HostEnv) -> Vec<(u8, u16)> {
    (0..BUCKET_SLOTS as u32)
        .filter_map(|index| {
            let r = record::<V4, _>(env, index)?;
            // SAFETY: it points into the table, which nobody else uses now.
            unsafe { Some((flow::ctl(r).phase(), (*r).key.source_port)) }
        })
        .collect()
}

fn live(env: &HostEnv) -> Vec<u16> {
    let all = records(env);
    assert!(
        all.iter().all(|(phase, _)| *phase == FREE || *phase == LIVE),
        "a slot is left half-way: {all:?}"
    );
    all.into_iter().filter(|(phase, _)| *phase == LIVE).map(|(_, port)| port).collect()
}

/// Runs `threads` copies of `work` in many orders, each time on a table of its own; then looks at it.
fn explore<T: Send + 'static>(
    threads: u16,
    work: impl Fn(&HostEnv, u16) -> T + Send + Sync + 'static,
    look: impl Fn(&HostEnv, Vec<T>) + Send + Sync + 'static,
) {
    let work = Arc::new(work);
    let explored = move || {
        let env = table();
        SWITCHING.set(true);
        let running: Vec<_> = (0..threads)
            .map(|number| {
                let (env, work) = (env.clone(), work.clone());
                thread::spawn(move || work(&env, number))
            })
            .collect();
        let outcomes = running.into_iter().map(|thread| thread.join().expect("it ends")).collect();
        SWITCHING.set(false);
        look(&env, outcomes);
    };
    shuttle::check_random(explored, SCHEDULES);
}

#[test]
fn of_threads_that_insert_one_key_at_once_never_two_keep_it() {
    explore(
        3,
        |env, number| {
            let taken = take(env, 7);
            if taken.is_slot() {
                tell(env, taken, number);
            }
            taken
        },
        |env, outcomes| {
            let kept = outcomes.iter().filter(|taken| taken.is_slot()).count();
            assert!(kept <= 1, "{outcomes:?}");
            assert_eq!(live(env).len(), kept, "who was told so has it");
        },
    );
}

#[test]
fn a_dead_flows_own_key_is_taken_over_in_its_grace_by_one_alone_and_by_nobody_who_keeps_the_grace() {
    explore(
        3,
        |env, number| {
            if number == 0 {
                // Opened, and dead by the time that the others come.
                let taken = take(env, 7);
                let Some(r) = record::<V4, _>(env, taken.index()).filter(|_| taken.is_slot()) else {
                    return taken;
                };
                tell(env, taken, number);
                // SAFETY: a word, as a clock that goes on would make it.
                unsafe { (&raw mut (*r).deadline).write_volatile(env.now() - 1) };
                return taken;
            }
            let grace = if number == 1 { Grace::Waived } else { Grace::Kept };
            let taken = take_with(env, 7, grace);
            if taken.is_slot() {
                tell(env, taken, number);
            }
            taken
        },
        |env, outcomes| {
            let kept = outcomes.iter().filter(|taken| taken.is_slot()).count();
            let standing = live(env);
            // Three that come at the same instant may all give way.
            assert_eq!(standing.len(), kept.min(1), "one slot has the key: {outcomes:?}");
        },
    );
}

#[test]
fn threads_that_try_again_agree_on_one_of_them_and_all_find_it() {
    explore(
        2,
        |env, number| {
            for _ in 0..50 {
                let taken = take(env, 7);
                if taken.is_slot() {
                    tell(env, taken, number);
                }
                if let Some((_, r)) = find::<V4, _>(env, &env.control, &key(7), env.now()) {
                    // SAFETY: it points into the table; what is published does not change.
                    return unsafe { (*r).rule };
                }
            }
            panic!("nobody ever got it")
        },
        |env, outcomes| {
            assert_eq!(outcomes[0], outcomes[1]);
            assert_eq!(live(env), [7]);
        },
    );
}

#[test]
fn a_bucket_that_is_filled_by_several_gives_each_a_slot_of_its_own_and_loses_none() {
    explore(
        4,
        |env, number| {
            // Eight keys in all. Who finds the free slots taken under his hands tries again, as a sender does.
            [0, 1].map(|which| {
                for _ in 0..50 {
                    let taken = take(env, 10 * number + which);
                    if taken.is_slot() {
                        tell(env, taken, number);
                        return taken.index();
                    }
                    assert_ne!(taken, Taken::EXISTS, "nobody else has this key");
                }
                panic!("there is a slot for everybody")
            })
        },
        |env, outcomes| {
            let mut slots: Vec<u32> = outcomes.into_iter().flatten().collect();
            slots.sort_unstable();
            assert_eq!(slots, (0..BUCKET_SLOTS as u32).collect::<Vec<_>>());
            let mut ports = live(env);
            ports.sort_unstable();
            assert_eq!(ports, [0, 1, 10, 11, 20, 21, 30, 31]);
        },
    );
}

#[test]
fn a_flow_is_found_whole_or_not_at_all() {
    explore(
        2,
        |env, number| {
            if number == 0 {
                let taken = take(env, 7);
                tell(env, taken, 9);
                return 0;
            }
            let mut found = 0;
            for _ in 0..8 {
                if let Some((_, r)) = find::<V4, _>(env, &env.control, &key(7), env.now()) {
                    // SAFETY: it points into the table; published fields do not change.
                    let told = unsafe { ((*r).new_source, (*r).new_source_port, (*r).rule) };
                    assert_eq!(told, (9, 9, 9));
                    found += 1;
                }
            }
            found
        },
        |env, _| assert_eq!(live(env), [7]),
    );
}

/// For about as long as it takes to end a flow and to open another: it is a slow reader who sees both.
fn linger() {
    (0..30).for_each(|_| step());
}

#[test]
fn what_is_copied_of_a_record_that_is_taken_over_meanwhile_is_one_flows_or_is_not_used() {
    explore(
        2,
        |env, number| {
            if number == 0 {
                tell(env, take(env, 7), 9);
                // Ended, and at once opened anew by who had it, with another translation.
                for mark in [8, 7] {
                    let (index, r) = find::<V4, _>(env, &env.control, &key(7), env.now()).expect("it lives");
                    // SAFETY: it points into the table.
                    let generation = unsafe { flow::ctl(r).generation() };
                    flow::end::<V4, _>(env, index, generation, env.now());
                    tell(env, take_with(env, 7, Grace::Waived), mark);
                }
                return;
            }
            for _ in 0..8 {
                let Some((_, r)) = find::<V4, _>(env, &env.control, &key(7), env.now()) else { continue };
                // As `forward::established` does.
                // SAFETY: it points into the table; what is torn is found out by the word.
                unsafe {
                    let before = flow::ctl(r);
                    let source = (&raw const (*r).new_source).read_volatile();
                    linger();
                    let port = (&raw const (*r).new_source_port).read_volatile();
                    linger();
                    let rule = (&raw const (*r).rule).read_volatile();
                    let after = flow::ctl(r);
                    if before.phase() == LIVE && after.generation() == before.generation() {
                        let one = (u32::from(port), rule) == (source, source) && (7..10).contains(&source);
                        assert!(one, "{source}, {port} and {rule} are not of one flow");
                    }
                }
            }
        },
        |env, _| assert_eq!(live(env), [7]),
    );
}

#[test]
fn a_key_given_back_by_one_is_anothers_and_a_port_has_one_owner_at_a_time() {
    explore(
        3,
        |env, number| {
            let mut had = 0;
            for _ in 0..4 {
                let taken = take(env, 7);
                if taken.is_slot() {
                    // Nobody finds it, nobody else gets it.
                    assert!(!take(env, 7).is_slot(), "it is ours");
                    if number == 0 {
                        withdraw::<V4, _>(env, taken);
                    } else {
                        tell(env, taken, number);
                        flow::end::<V4, _>(env, taken.index(), taken.generation(), env.now());
                    }
                    had += 1;
                }
            }
            had
        },
        |env, outcomes| {
            // A flow that has ended holds its key for the grace: at most one thread got as far as that.
            let ended = outcomes[1..].iter().sum::<i32>();
            assert!(ended <= 1, "{outcomes:?}");
            let phases: Vec<u8> = records(env).into_iter().map(|(phase, _)| phase).collect();
            assert!(!phases.contains(&BUSY) && !phases.contains(&LIVE), "{phases:?}");
            env.set_now(env.now() + GRACE + 1);
            assert!(take(env, 7).is_slot(), "and is free behind it");
        },
    );
}

const GUEST: u16 = 5;

fn ledger(env: &HostEnv) -> (i32, u64) {
    let guest = env.guest_flows(GUEST.into()).expect("a next hop");
    // SAFETY: an element of the table; its words are only accessed atomically.
    unsafe {
        (quota::held(atomic::load(&raw const (*guest).held)), atomic::load(&raw const (*guest).waiting))
    }
}

/// Opens the flow from the world with this port to the guest, as the claim does; its slot and generation.
fn open(env: &HostEnv, port: u16) -> Option<Taken> {
    let guest = env.guest_flows(GUEST.into()).expect("a next hop");
    // SAFETY: as above.
    unsafe {
        atomic::add(&raw mut (*guest).held, 1);
        atomic::add(&raw mut (*guest).waiting, 1);
    }
    let (mut notes, key) = (0, FlowKey { network: WORLD, ..key(port) });
    // SAFETY: a word of our own.
    let taken = unsafe { insert::<V4, _>(env, &key, env.now(), Grace::Kept, &raw mut notes) };
    if !taken.is_slot() {
        quota::give_back(env, GUEST);
        // SAFETY: as above.
        unsafe { atomic::add(&raw mut (*guest).waiting, 1u64.wrapping_neg()) };
        return None;
    }
    let body = Body { peer: taken.index(), deadline: env.now() + 1, hops: hops(GUEST, 9), ..Body::default() };
    publish::<V4, _>(env, taken, &body, Ctl::new(taken.generation(), LIVE, 0, 0, FLAG_FORWARD));
    let mut ctx = Context { now: env.now(), ..Context::default() };
    ctx.key.network = WORLD;
    ctx.relief.payer = GUEST;
    quota::enter::<V4, _>(env, &ctx, &env.control, taken.index(), taken.generation());
    Some(taken)
}

#[test]
fn a_flow_that_is_ended_freed_and_taken_over_by_several_at_once_counts_once_and_the_ring_bounds_the_half_open()
 {
    explore(
        3,
        |env, number| {
            let mut opened = 0;
            for turn in 0..4 {
                if let Some(taken) = open(env, 10 * number + turn) {
                    opened += 1;
                    if turn == 1 {
                        // Another may be ending it in the ring's name.
                        flow::end::<V4, _>(env, taken.index(), taken.generation(), env.now());
                    }
                }
                if turn == 2 && number == 0 {
                    // All that has been made so far is dead, but what is half made is not abandoned.
                    env.set_now(env.now() + GRACE + 2);
                }
            }
            opened
        },
        |env, outcomes| {
            let lives = records(env).into_iter().filter(|(phase, _)| *phase == LIVE).count();
            let (held, waiting) = ledger(env);
            assert_eq!(held as usize, lives, "{outcomes:?}");
            // A table of one bucket has a ring of one place.
            assert_eq!(waiting, 1, "{outcomes:?}");
            let now = env.now();
            let half_open = (0..BUCKET_SLOTS as u32).filter(|index| {
                let r = record::<V4, _>(env, *index).expect("a slot");
                // SAFETY: it points into the table, which nobody else uses now.
                unsafe { flow::ctl(r).phase() == LIVE && !clock::passed((*r).deadline, now) }
            });
            assert!(half_open.count() <= 1, "{outcomes:?}");
        },
    );
}
