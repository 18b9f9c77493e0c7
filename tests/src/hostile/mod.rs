//! What anybody may hand to Portcullis, as bytes: each function here takes any, and panics if a promise is broken. The fuzzer
//! in `fuzz/` drives them, and `tests/tests/fuzz_corpus.rs` replays what it once found (design §7).

mod azure;
mod frames;
mod policy;
mod socket;

pub use azure::azure;
pub use frames::frames;
pub use policy::policy;
pub use socket::socket;

/// A function of this module.
pub type Target = fn(&[u8]);

/// Every target with the name of its corpus folder in `fuzz/corpus`.
pub const TARGETS: [(&str, Target); 4] =
    [("frames", frames), ("policy", policy), ("azure", azure), ("socket", socket)];
