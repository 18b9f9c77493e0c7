//! What the kernel's own NAT knows: taken over at the first start, so that connections through a masquerade go on with the
//! address and port the world knows them by (ADR 0011).
//!
//! ```text
//! netlink   the table, entry by entry       bytes of the kernel, bounded
//! entry     one connection, as told there
//! takeover  which of them are ours, and what flows they come to
//! ```

mod entry;
mod netlink;
mod takeover;

pub use entry::{Connection, Tuple};
pub use netlink::for_each;
pub use takeover::{TakenOver, Takeover};
