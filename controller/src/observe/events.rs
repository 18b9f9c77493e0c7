//! The drops and exhaustions that the datapath samples: the latest of them, and how often each guest ran out of ports.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use portcullis_common::Reason;
use portcullis_common::layout::Event;

use crate::daemon::Shared;
use crate::datapath::Events;

/// Events that are kept.
const KEPT: usize = 256;
/// Guests whose exhaustions are counted; spoofed sources do not get this far, so it is only a bound.
const GUESTS: usize = 65_536;

#[derive(Debug, Default)]
struct Seen {
    latest: VecDeque<Event>,
    total: u64,
    exhausted: HashMap<(u16, u32), u64>,
}

/// What was seen of the events since the daemon's start.
#[derive(Debug, Default)]
pub struct EventLog(Mutex<Seen>);

impl EventLog {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of an event.
    pub fn note(&self, event: Event) {
        let mut seen = self.seen();
        seen.total += 1;
        let reason = Reason::from_index(u32::from(event.reason));
        if matches!(reason, Some(Reason::SnatExhausted | Reason::SnatRefused)) {
            let room = seen.exhausted.len() < GUESTS;
            let key = (event.network, event.source);
            match seen.exhausted.get_mut(&key) {
                Some(count) => *count += 1,
                None if room => _ = seen.exhausted.insert(key, 1),
                None => {}
            }
        }
        if seen.latest.len() == KEPT {
            seen.latest.pop_front();
        }
        seen.latest.push_back(event);
    }

    /// The latest events, newest first.
    pub fn latest(&self) -> Vec<Event> {
        self.seen().latest.iter().rev().copied().collect()
    }

    /// Sampled exhaustions of the guest with this address (network order) in this network.
    pub fn exhausted(&self, network: u16, address: u32) -> u64 {
        self.seen().exhausted.get(&(network, address)).copied().unwrap_or(0)
    }
}

/// Takes note of events until the daemon ends.
pub async fn follow(events: Events, shared: Arc<Shared>) {
    let mut events = match events.into_async() {
        Ok(events) => events,
        Err(error) => return log::warn!("drops will not be shown one by one: {error}"),
    };
    loop {
        match events.next().await {
            Ok(event) => {
                shared.health_log.note(&event, &shared);
                shared.events.note(event);
            }
            Err(error) => return log::warn!("drops are not shown one by one any more: {error}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_events_are_kept_and_exhaustions_are_counted_by_guest() {
        let log = EventLog::default();
        for i in 0..KEPT as u32 + 10 {
            log.note(Event { tick: i, ..Event::default() });
        }
        let latest = log.latest();
        assert_eq!((latest.len(), latest[0].tick, latest[KEPT - 1].tick), (KEPT, KEPT as u32 + 9, 10));
        let exhausted =
            Event { reason: Reason::SnatExhausted as u8, network: 3, source: 4, ..Event::default() };
        log.note(exhausted);
        log.note(exhausted);
        assert_eq!((log.exhausted(3, 4), log.exhausted(3, 5)), (2, 0));
    }
}
