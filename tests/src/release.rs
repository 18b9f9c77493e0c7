//! Giving a claimed port back at once, by hand. A flow that ends gives it back after its hold, a thousand ports in
//! seconds; tests that claim millions cannot wait for that.

use portcullis_common::engine::host::HostEnv;
use portcullis_common::flow::{self, Ctl, FREE, LIVE};
use portcullis_common::{HalfRecord, atomic, quota};

/// Frees a flow the way the reaper does: compare-exchange of the control word, reverse half last, so that the port is
/// free only when whoever calls this has noted that it will be. `record` gives a slot of the flow table by its index,
/// `forward` is the index of the half that opened the flow, and `recycled` gives back what the guest holds (quota).
///
/// # Panics
/// If the flow is not alive, or somebody else changes it meanwhile.
pub fn release(record: impl Fn(u32) -> *mut HalfRecord, forward: u32, recycled: impl Fn(&HalfRecord)) {
    // SAFETY: the caller's table is live, and its records are read and written by the table's own protocol.
    unsafe {
        let f = record(forward);
        let c = flow::ctl(f);
        assert_eq!(c.phase(), LIVE);
        let r = record((*f).peer);
        for slot in [f, r] {
            let c = flow::ctl(slot);
            let was = HalfRecord { ctl: c.0, ..slot.read_volatile() };
            let gone = Ctl::new(c.generation().wrapping_add(1), FREE, 0, 0, 0);
            assert_eq!(atomic::compare_exchange(&raw mut (*slot).ctl, c.0, gone.0), c.0);
            recycled(&was);
        }
    }
}

/// What [`release`] gives back on the host engine.
pub fn give_back(env: &HostEnv, was: &HalfRecord) {
    // SAFETY: a record as it was when its control word was taken away.
    unsafe { quota::recycled(env, was, Ctl(was.ctl)) };
}
