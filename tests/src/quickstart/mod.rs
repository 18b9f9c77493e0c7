//! `cargo xtask run`: `examples/quickstart.yaml` at work, shown with real traffic.
//!
//! ```text
//!   vm1 10.0.1.4 ---- pc-vm1 .---------.
//!   vm2 10.0.1.5 ---- pc-vm2 | gateway | pc-up ---- internet (203.0.113.100, 198.51.100.1)
//!   vm3 10.0.2.4 ---- pc-vm3 '---------'
//! ```
//!
//! Each step sends something and has its outcome written down beside it ([`plan`]), by hand and from the policy: nobody
//! asks the gateway what is right. What arrived is what the real server saw; who decided is what the daemon says, and is
//! believed only if the counter of that rule or reason moved. On a terminal it then stays up with traffic of its own and
//! shows the counters ([`live`]).

mod command;
mod live;
mod plan;
mod report;
mod run;
mod screen;
mod stand;
mod traffic;

pub use command::{Arguments, execute};
