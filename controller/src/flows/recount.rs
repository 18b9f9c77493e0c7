//! What each guest holds, counted anew: a program or a controller that ends between taking a record's control word away
//! and giving back its place leaves one too many in the count, and tables adopted from elsewhere may not be counted at
//! all. The reaper reads every record anyway.

use portcullis_common::layout::NEXT_HOP_SLOTS;
use portcullis_common::quota::held;

use crate::datapath::GuestUses;

/// Compares the datapath's counts with what a sweep has found. A guest is put right when two sweeps running found the same
/// difference and nothing has happened to it from before the first to after the second: its word changes with every flow it
/// opens and every one that ends.
#[derive(Debug, Default)]
pub struct Recount {
    before: Vec<u64>,
    found: Vec<u32>,
    /// The last sweep's words and what it found, of guests to which nothing happened meanwhile.
    last: Vec<Option<(u64, u32)>>,
}

impl Recount {
    /// A sweep begins.
    pub fn begin(&mut self, guests: &GuestUses) {
        self.before = guests.words();
        self.found = vec![0; NEXT_HOP_SLOTS as usize];
    }

    /// Where the sweep counts.
    pub fn held(&mut self) -> &mut [u32] {
        &mut self.found
    }

    /// The sweep is over; how many guests were put right.
    pub fn end(&mut self, guests: &GuestUses) -> u64 {
        let after = guests.words();
        let quiet: Vec<Option<(u64, u32)>> = after
            .iter()
            .zip(&self.before)
            .zip(&self.found)
            .map(|((after, before), found)| (after == before).then_some((*after, *found)))
            .collect();
        let mut corrected = 0;
        for (hop, (now, last)) in (0..).zip(quiet.iter().zip(&self.last)) {
            let Some((word, found)) = *now else { continue };
            if *now == *last && i64::from(held(word)) != i64::from(found) && guests.correct(hop, word, found)
            {
                corrected += 1;
            }
        }
        self.last = quiet;
        corrected
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::{FlowTable, now_tick};
    use crate::flows::kill::tests::{Put, TCP, put, with_tables};
    use portcullis_common::layout::KIND_MAPPING;

    fn sweep(recount: &mut Recount, tables: [&FlowTable; 2]) -> u64 {
        recount.begin(tables[0].guests());
        for table in tables {
            table.sweep_counting(now_tick(), recount.held(), |_, _| {});
        }
        recount.end(tables[0].guests())
    }

    #[test]
    fn a_count_that_is_wrong_is_put_right_once_two_sweeps_agree_and_nothing_has_happened_to_the_guest() {
        with_tables(|flows, flows6| {
            // Flows that nobody has counted, of two guests; the port of a socket is not one.
            put(flows, TCP);
            put(flows, Put { slot: 2, ..TCP });
            put(flows, Put { slot: 4, kind: KIND_MAPPING, ..TCP });
            put(flows6, Put { guest: 8, ..TCP });
            let held = |guest| flows.guests().read(guest).held;
            let mut recount = Recount::default();
            assert_eq!(sweep(&mut recount, [flows, flows6]), 0);
            assert_eq!([7, 8].map(held), [0, 0], "one look is not enough");
            assert_eq!(sweep(&mut recount, [flows, flows6]), 2);
            assert_eq!([7, 8].map(held), [2, 1]);
            assert_eq!(sweep(&mut recount, [flows, flows6]), 0, "and then all is well");

            assert!(flows.end(2, &flows.read(2).unwrap(), now_tick()));
            assert_eq!([7, 8].map(held), [1, 1], "an ended flow counts no more");
            put(flows, Put { slot: 6, ..TCP });
            assert_eq!(sweep(&mut recount, [flows, flows6]), 0);
            put(flows, Put { slot: 2, ..TCP });
            assert_eq!(sweep(&mut recount, [flows, flows6]), 0, "what was found has changed");
            assert!(flows.end(2, &flows.read(2).unwrap(), now_tick()));
            assert_eq!(sweep(&mut recount, [flows, flows6]), 0, "a flow has ended since");
            assert_eq!(sweep(&mut recount, [flows, flows6]), 1);
            assert_eq!([7, 8].map(held), [2, 1]);
        });
    }
}
