//! The allocation history on disk: changes, torn lines, rotation.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::super::holdings::{Held, Thing};
use super::*;

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("pcd-history-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

const FRONTEND: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 10));
const OWN: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(203, 0, 113, 20));

fn held(member: &str, rule: &str, draining: bool, since: u64) -> Held {
    Held { member: member.into(), rule: rule.into(), draining, since }
}

/// These units of TCP, and an address and a listener that never change.
fn holdings(units: &[(u16, &str, bool)], time: u64) -> Holdings {
    let mut all = BTreeMap::new();
    for &(unit, member, draining) in units {
        all.insert(Thing::Unit(FRONTEND, 6, unit), held(member, "", draining, time));
    }
    all.insert(Thing::Instance(OWN), held("vm3/a", "", false, time));
    all.insert(
        Thing::Listener(FRONTEND, 6, 80),
        held("", "loadBalancers/lb/loadBalancingRules/http", false, time),
    );
    Holdings(all)
}

fn who(directory: &Path, port: u16, at: u64) -> Option<(String, bool, u64)> {
    let known = replay(directory, Some(at)).unwrap();
    known.holdings.who(FRONTEND, 6, port).map(|(_, h)| (h.member.clone(), h.draining, h.since))
}

#[test]
fn who_had_a_port_is_known_for_every_moment_since_the_history_began() {
    let scratch = Scratch::new("moments");
    let mut history = History::open(&scratch.0);
    history.note(holdings(&[(128, "vm1/a", false), (129, "vm1/a", false)], 1000), 1000).unwrap();
    history.note(holdings(&[(128, "vm1/a", false), (129, "vm1/a", true)], 2000), 2000).unwrap();
    assert_eq!(
        history.note(holdings(&[(128, "vm1/a", false), (129, "vm1/a", true)], 2500), 2500).unwrap(),
        0
    );
    // By another daemon.
    let mut history = History::open(&scratch.0);
    history.note(holdings(&[(128, "vm1/a", false), (129, "vm2/a", false)], 3000), 3000).unwrap();
    history.note(holdings(&[(129, "vm2/a", false)], 4000), 4000).unwrap();
    let vm1 = |draining, since| Some(("vm1/a".to_owned(), draining, since));
    let at = |time| who(&scratch.0, 1032, time);
    assert_eq!(
        [at(1000), at(1999), at(2000), at(2999)],
        [vm1(false, 1000), vm1(false, 1000), vm1(true, 2000), vm1(true, 2000)]
    );
    assert_eq!(at(3000), Some(("vm2/a".to_owned(), false, 3000)));
    assert_eq!(at(u64::MAX), Some(("vm2/a".to_owned(), false, 3000)));
    assert_eq!([who(&scratch.0, 1024, 3999), who(&scratch.0, 1024, 4000)], [vm1(false, 1000), None]);
    assert_eq!(at(999), None);
    assert_eq!(replay(&scratch.0, Some(999)).unwrap().begins, Some(1000));
}

#[test]
fn listeners_and_addresses_of_ones_own_are_in_it_too() {
    let scratch = Scratch::new("things");
    let mut history = History::open(&scratch.0);
    history.note(holdings(&[], 1000), 1000).unwrap();
    let known = replay(&scratch.0, None).unwrap().holdings;
    let (thing, held) = known.who(FRONTEND, 6, 80).unwrap();
    assert_eq!(
        (thing, held.rule.as_str()),
        (Thing::Listener(FRONTEND, 6, 80), "loadBalancers/lb/loadBalancingRules/http")
    );
    assert_eq!(known.who(OWN, 17, 9).unwrap().1.member, "vm3/a");
    assert!(known.who(FRONTEND, 17, 80).is_none() && known.knows(FRONTEND));
}

#[test]
fn a_torn_line_is_skipped_and_what_comes_after_it_is_read() {
    let scratch = Scratch::new("torn");
    let mut history = History::open(&scratch.0);
    history.note(holdings(&[(128, "vm1/a", false)], 1000), 1000).unwrap();
    let path = scratch.0.join(CURRENT);
    let mut bytes = fs::read(&path).unwrap();
    bytes.extend(br#"{"time":"1970-01-01T00:20:00Z","what":"gai"#);
    fs::write(&path, bytes).unwrap();
    let mut history = History::open(&scratch.0);
    history.note(holdings(&[(128, "vm2/a", false)], 3000), 3000).unwrap();
    let known = replay(&scratch.0, None).unwrap();
    assert_eq!((known.torn, who(&scratch.0, 1024, 5000)), (1, Some(("vm2/a".to_owned(), false, 3000))));
    // Whatever is in the file: no panic, and no answer that was not there.
    let mut seed = 0x1234_5678_9abc_def1_u64;
    for length in [0, 1, 63, 4096] {
        let noise: Vec<u8> = (0..length)
            .map(|_| {
                seed ^= seed << 13;
                seed ^= seed >> 7;
                seed ^= seed << 17;
                seed as u8
            })
            .collect();
        let mut known = Replayed::default();
        read(noise.as_slice(), None, &mut known).unwrap();
        assert_eq!(known.holdings, Holdings::default());
    }
}

#[test]
fn the_files_stay_bounded_and_either_is_whole_without_the_other() {
    let scratch = Scratch::new("rotation");
    let mut history = History::open(&scratch.0);
    history.largest = 8192;
    for time in 1000..1200u64 {
        let member = if time % 2 == 0 { "vm1/a" } else { "vm2/a" };
        history.note(holdings(&[(128, member, false), (129, "vm9/a", false)], time), time).unwrap();
        history.largest = 8192;
    }
    let size = |name: &str| fs::metadata(scratch.0.join(name)).unwrap().len();
    assert!(size(CURRENT) <= 8192 && size(BEFORE) <= 8192);
    let early = who(&scratch.0, 1024, 1180);
    assert_eq!(early, Some(("vm1/a".to_owned(), false, 1180)));
    fs::remove_file(scratch.0.join(BEFORE)).unwrap();
    assert_eq!(
        who(&scratch.0, 1032, 1199),
        Some(("vm9/a".to_owned(), false, 1000)),
        "since it began, not since the file did"
    );
}
