//! `examples/loadbalancer.yaml` with small changes, and what is said about them.

use portcullis::policy::network::Network;
use portcullis::policy::{self, Diagnostics, Severity};

use super::{Changes, one, replaced};

pub const GOOD: &str = include_str!("../../../examples/loadbalancer.yaml");

pub const RULES: &str = "    loadBalancingRules:\n";
pub const NAT: &str = "    inboundNatRules:\n";
pub const OUT: &str = "    outboundRules:\n";
pub const POOLS: &str = "    backendAddressPools:\n";
pub const SSH: &str = "frontendPortRangeStart: 2210, frontendPortRangeEnd: 2219";
pub const SINGLE: &str = "frontendPort: 2201, backendPort: 22, backendIPConfiguration: web1/v4";
pub const ALIVE: &str =
    "protocol: Http, port: 8080, requestPath: /health, intervalInSeconds: 5, probeThreshold: 2";
pub const DISABLED: &str = "        disableOutboundSnat: true\n";
pub const DEFAULT: &str = "defaultOutbound:\n  publicIPAddress: pip-default\n  idleTimeoutInMinutes: 4\n";
pub const ACCESS: &str = ", defaultOutboundAccess: true";

pub fn changed(changes: Changes<'_>) -> String {
    replaced(GOOD, changes)
}

/// In order, without a warning.
pub fn accepted(changes: Changes<'_>) -> Network {
    let loaded = policy::parse("policy.yaml", &changed(changes)).unwrap_or_else(|found| panic!("{found}"));
    assert!(loaded.warnings.is_empty(), "{}", loaded.warnings);
    loaded.network
}

/// Exactly one error: where its caret stands, what it says and what to do.
pub fn refused(changes: Changes<'_>, at: &str, message: &str, help: &str) {
    super::refused_text(&changed(changes), at, message, help);
}

/// In order, but for exactly one warning.
pub fn warned(changes: Changes<'_>, at: &str, message: &str, help: &str) {
    let text = changed(changes);
    let loaded = policy::parse("policy.yaml", &text).unwrap_or_else(|found| panic!("{found}"));
    one(&loaded.warnings, Severity::Warning, &text, at, message, help);
}

/// What is found in a policy that is wrong.
pub fn findings(changes: Changes<'_>) -> Diagnostics {
    policy::parse("policy.yaml", &changed(changes)).map(|_| ()).expect_err("the policy is wrong")
}

/// All messages, for policies with several findings.
pub fn messages(findings: &Diagnostics) -> Vec<String> {
    findings.entries().iter().map(|entry| entry.message.clone()).collect()
}
