//! Writing flows from here: those of another layout, and of the NAT that was here before us.
//!
//! It is the programs' own insertion ([`portcullis_common::flow::insert`]) over the tables in our memory, beside them while
//! they run: whoever publishes a key first has it.

use portcullis_common::engine::Context;
use portcullis_common::env::{Budget, Env, Refusal, Step};
use portcullis_common::family::{Family, V4, V6};
use portcullis_common::flow::{self, Body, Ctl, Grace, LIVE, Taken};
use portcullis_common::layout::{
    Bucket, Bucket6, Control, Cursors, Device, FlowKey, FlowKey6, GuestFlows, HalfRecord, HalfRecord6,
    NextHop,
};
use portcullis_common::policy::Page;
use portcullis_common::quota::{self, counts_for};
use portcullis_common::reassembly::DatagramSet;
use portcullis_common::tcp_state::{self, State};
use portcullis_common::{Reason, atomic};

use super::flow_table::FlowTable;
use super::load::Datapath;

/// What became of a flow that was to be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Written {
    New,
    /// One of its directions is in the table already.
    Exists,
    /// No room near where it would have to stand.
    Full,
}

/// Both flow tables, to write into.
#[derive(Debug)]
pub struct FlowWriter {
    control: Control,
    tables: [FlowTable; 2],
}

impl Datapath {
    /// Maps the flow tables to write into them.
    ///
    /// # Errors
    /// If they cannot be mapped.
    pub fn flow_writer(&self) -> anyhow::Result<FlowWriter> {
        Ok(FlowWriter { control: self.control.read(), tables: [self.flow_table()?, self.flow_table6()?] })
    }
}

/// A family whose records can be written from a whole one.
trait Keyed: Family {
    fn key_of(record: &HalfRecord6) -> Self::Key;
    fn translation(record: &HalfRecord6) -> (Self::Address, Self::Address);
}

impl Keyed for V4 {
    fn key_of(record: &HalfRecord6) -> FlowKey {
        record.half.key
    }
    fn translation(record: &HalfRecord6) -> (u32, u32) {
        (record.half.new_source, record.half.new_destination)
    }
}

impl Keyed for V6 {
    fn key_of(record: &HalfRecord6) -> FlowKey6 {
        FlowKey6 { key: record.half.key, source: record.source, destination: record.destination }
    }
    fn translation(record: &HalfRecord6) -> ([u32; 4], [u32; 4]) {
        (record.new_source, record.new_destination)
    }
}

impl FlowWriter {
    /// Writes a flow: both halves whole, the one of whoever opened it first. Of the control words TCP state, idle class and
    /// flags are taken, of a flow of IPv4 only the `half`; which slots they get is decided here.
    pub fn write(&self, v6: bool, pair: &[HalfRecord6; 2], now: u32) -> Written {
        if v6 { self.write_of::<V6>(pair, now) } else { self.write_of::<V4>(pair, now) }
    }

    fn write_of<F: Keyed>(&self, pair: &[HalfRecord6; 2], now: u32) -> Written {
        // Counted like any other, and without a limit: it was here before there was one.
        let payer = counts_for(&pair[0].half);
        if let Some(hop) = payer {
            quota::reserve(self, hop);
        }
        let written = self.insert_both::<F>(pair, now);
        if written != Written::New
            && let Some(hop) = payer
        {
            quota::give_back(self, hop);
        }
        written
    }

    fn insert_both<F: Keyed>(&self, pair: &[HalfRecord6; 2], now: u32) -> Written {
        let forward = self.take::<F>(&pair[0], now);
        if !forward.is_slot() {
            return why(forward);
        }
        let back = self.take::<F>(&pair[1], now);
        if !back.is_slot() {
            flow::withdraw::<F, Self>(self, forward);
            return why(back);
        }
        let generation = flow::common_generation(forward, back);
        self.publish::<F>(back, forward.index(), &pair[1], generation);
        self.publish::<F>(forward, back.index(), &pair[0], generation);
        Written::New
    }

    fn take<F: Keyed>(&self, record: &HalfRecord6, now: u32) -> Taken {
        let key = F::key_of(record);
        let mut notes = 0;
        loop {
            // SAFETY: `notes` is ours.
            let taken = unsafe { flow::insert::<F, Self>(self, &key, now, Grace::Kept, &raw mut notes) };
            if taken != Taken::CONTENDED {
                return taken;
            }
        }
    }

    fn publish<F: Keyed>(&self, taken: Taken, peer: u32, record: &HalfRecord6, generation: u32) {
        let Some(to) = flow::record::<F, Self>(self, taken.index()) else { return };
        let (source, destination) = F::translation(record);
        // SAFETY: the slot is ours until it is published.
        unsafe { F::set_new(to, source, destination) };
        let half = &record.half;
        let body = Body {
            peer,
            deadline: half.deadline,
            hops: half.hops,
            new_source: half.new_source,
            new_destination: half.new_destination,
            new_source_port: half.new_source_port,
            new_destination_port: half.new_destination_port,
            rule: half.rule,
            ack: half.ack,
        };
        let ctl = Ctl(half.ctl);
        flow::publish::<F, Self>(
            self,
            taken,
            &body,
            Ctl::new(generation, LIVE, ctl.tcp(), ctl.idle(), ctl.flags()),
        );
        // SAFETY: in the table; words that are written whole. A packet may have counted itself since.
        unsafe {
            (*to).packets = (*to).packets.wrapping_add(half.packets);
            (*to).bytes_low = (*to).bytes_low.wrapping_add(half.bytes_low);
        }
    }

    /// Brings a flow that is here already to what `pair` says happened since: the later deadlines, what TCP has seen, and the last
    /// numbers that were acknowledged.
    /// `false` if it is not here, or something else has its keys.
    pub fn merge(&self, v6: bool, pair: &[HalfRecord6; 2], now: u32) -> bool {
        if v6 { self.merge_of::<V6>(pair, now) } else { self.merge_of::<V4>(pair, now) }
    }

    fn merge_of<F: Keyed>(&self, pair: &[HalfRecord6; 2], now: u32) -> bool {
        let find = |record| flow::find::<F, Self>(self, &self.control, &F::key_of(record), now);
        let (Some(a), Some(b)) = (find(&pair[0]), find(&pair[1])) else { return false };
        // SAFETY: both are in the table; words that are written whole.
        unsafe {
            if (*a.1).peer != b.0 || (*b.1).peer != a.0 {
                return false;
            }
            let there = Ctl(pair[0].half.ctl).tcp();
            for (to, from) in [(a.1, &pair[0].half), (b.1, &pair[1].half)] {
                if from.deadline.wrapping_sub((*to).deadline) as i32 > 0 {
                    (*to).deadline = from.deadline;
                }
                // While a FIN is under way the number says something else.
                let plain = tcp_state::OPENED | tcp_state::ANSWERED;
                let (known, read) = (u32::from_be((*to).ack), u32::from_be(from.ack));
                let later = read != 0 && (known == 0 || read.wrapping_sub(known) as i32 > 0);
                if later && there == plain && flow::ctl(to).tcp() & !plain == 0 {
                    (*to).ack = from.ack;
                }
                for _ in 0..16 {
                    let seen = flow::ctl(to);
                    let wanted = seen.with_tcp(further(seen.tcp(), there));
                    if seen == wanted
                        || seen.phase() != LIVE
                        || atomic::compare_exchange(&raw mut (*to).ctl, seen.0, wanted.0) == seen.0
                    {
                        break;
                    }
                }
            }
        }
        true
    }
}

/// The further one of two states of a connection: `here` and as the other table has it. Opened anew here after its end is
/// further than that end.
fn further(here: u8, there: u8) -> u8 {
    match (tcp_state::state(here), tcp_state::state(there)) {
        (_, State::HalfOpen) | (State::HalfOpen, State::Closed | State::Reset) => here,
        (State::HalfOpen, _) => there,
        _ => here | there,
    }
}

fn why(taken: Taken) -> Written {
    if taken == Taken::EXISTS { Written::Exists } else { Written::Full }
}

/// The tables of flows, and nothing else: insertion asks for no more.
impl Env for FlowWriter {
    fn now(&self) -> u32 {
        super::flow_table::now_tick()
    }
    fn control(&self) -> Option<*const Control> {
        Some(&raw const self.control)
    }
    fn device(&self, _: u32) -> Option<*const [Device; 2]> {
        None
    }
    fn next_hop(&self, _: u32) -> Option<*mut NextHop> {
        None
    }
    fn bucket(&self, index: u32) -> Option<*mut Bucket> {
        self.tables[0].bucket(index)
    }
    fn bucket6(&self, index: u32) -> Option<*mut Bucket6> {
        self.tables[1].bucket6(index)
    }
    fn guest_flows(&self, hop: u32) -> Option<*mut GuestFlows> {
        self.tables[0].guests().element(hop)
    }
    fn cursors(&self) -> Option<*mut Cursors> {
        None
    }
    fn half_open(&self, _: bool, _: u32) -> Option<*mut u64> {
        None
    }
    fn page(&self, _: u32, _: u32) -> Option<*const Page> {
        None
    }
    fn address_class(&self, _: u32, _: u32) -> u32 {
        0
    }
    fn address_class6(&self, _: u32, _: &[u32; 4]) -> u32 {
        0
    }
    fn space(&self, _: u32, _: u16, _: u32) -> u32 {
        0
    }
    fn space6(&self, _: u32, _: u16, _: &[u32; 4]) -> u32 {
        0
    }
    fn endpoint(&self, _: u32, _: u16, _: u32) -> u32 {
        0
    }
    fn endpoint6(&self, _: u32, _: u16, _: &[u32; 4]) -> u32 {
        0
    }
    fn listener(&self, _: u32, _: u32, _: u16, _: u8) -> u32 {
        0
    }
    fn listener6(&self, _: u32, _: &[u32; 4], _: u16, _: u8) -> u32 {
        0
    }
    fn route(&self, _: u32) -> u32 {
        0
    }
    fn route6(&self, _: &[u32; 4]) -> u32 {
        0
    }
    fn count(&self, _: Reason, _: u32) {}
    fn count_rule(&self, _: u32, _: u32) {}
    fn event(&self, _: &Context, _: Reason) {}
    fn refused(&self, _: &FlowKey) -> Option<Refusal> {
        None
    }
    fn refuse(&self, _: &FlowKey, _: Refusal) {}
    fn tried(&self, _: u32) {}
    fn datagrams(&self, _: u32) -> Option<*mut DatagramSet> {
        None
    }
    fn recall(&self, _: &mut Context) {}
    fn remember(&self, _: &mut Context) {}
    fn identification(&self) -> u16 {
        0
    }
    fn extend_mapping(&self, _: &mut Context, _: u8) {}
    fn extend_mapping6(&self, _: &mut Context, _: u8) {}
    fn tcp_turn(&self, _: &mut Context, _: u32, _: Ctl) {}
    fn tcp_turn6(&self, _: &mut Context, _: u32, _: Ctl) {}
    fn insert(&self, _: &mut Context) -> Taken {
        Taken::FULL
    }
    fn insert6(&self, _: &mut Context) -> Taken {
        Taken::FULL
    }
    fn spend(&self, _: Budget, _: u32, _: u32) -> bool {
        false
    }
    fn dry_run(&self) -> bool {
        false
    }
    fn search<S: Step<Self>>(&self, _: &mut Context, _: u32) {}
}

/// A half of IPv4, as [`FlowWriter::write`] takes it.
pub fn whole(half: HalfRecord) -> HalfRecord6 {
    HalfRecord6 { half, ..HalfRecord6::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use portcullis_common::tcp_state::{
        ACKED_FORWARD, ACKED_REVERSE, ANSWERED, FIN_FORWARD, FIN_REVERSE, OPENED, RESET,
    };

    #[test]
    fn of_two_states_the_further_one_stays_and_what_opened_anew_is_not_closed_again() {
        let asked = OPENED | ACKED_FORWARD;
        let established = OPENED | ANSWERED;
        let half_closed = established | FIN_FORWARD | ACKED_FORWARD;
        let closed = half_closed | FIN_REVERSE | ACKED_REVERSE;
        for (here, there, result) in [
            (asked, established, established),
            (established, asked, established),
            (asked, half_closed, half_closed),
            (established, half_closed, half_closed),
            (half_closed, established, half_closed),
            (half_closed, closed, closed),
            (established, established | RESET, established | RESET),
            (OPENED, closed, OPENED),
            (OPENED, established | RESET, OPENED),
        ] {
            assert_eq!(further(here, there), result, "{here} and {there}");
        }
    }
}
