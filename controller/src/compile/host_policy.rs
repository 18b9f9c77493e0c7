//! The tables of a generation for the engine in this process: `explain`, tests.

use portcullis_common::engine::host::HostPolicy;

use super::Compiled;

impl Compiled {
    /// The same tables as in the kernel, in plain memory.
    pub fn host_policy(&self) -> HostPolicy {
        let mut policy = HostPolicy { pages: self.pages.clone(), ..HostPolicy::default() };
        for &(length, address, class) in &self.prefixes {
            policy.prefixes.insert4(length, address, class);
        }
        for &(length, address, class) in &self.prefixes6 {
            policy.prefixes6.insert6(length, address, class);
        }
        for &(routing, length, address, value) in &self.spaces {
            policy.spaces.entry(routing).or_default().insert4(length, address, value);
        }
        for &(routing, length, address, value) in &self.spaces6 {
            policy.spaces6.entry(routing).or_default().insert6(length, address, value);
        }
        policy.endpoints.extend(self.endpoints.iter().copied());
        policy.endpoints6.extend(self.endpoints6.iter().copied());
        policy
    }
}
