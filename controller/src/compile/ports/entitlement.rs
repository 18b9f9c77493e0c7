//! How many ports a member of a pool is entitled to (`reference/azure.md` §2.2, §2.3).

use portcullis_common::policy::UNIT_PORTS;

use super::Pool;
use crate::compile::error::CompileError;
use crate::policy::network::Allocation;

/// Azure's code for a rule that asks for more ports than its frontends have.
pub const EXCEEDS_AVAILABLE: &str =
    "SpecifiedAllocatedOutboundPortsForOutboundRuleExceedsTotalNumberOfAvailablePorts";
/// Azure's code for a number of ports that is not a multiple of 8.
pub const NOT_A_MULTIPLE: &str = "SpecifiedAllocatedOutboundPortsForOutboundRuleIsNotAMultipleOfEight";

/// No member has more than this by default, however many frontends there are.
const MOST: u32 = 1024;

/// Default ports per member for one frontend: Azure's table. `None` above 1,000 members, where it has no answer.
pub fn tier(members: usize) -> Option<u32> {
    Some(match members {
        0..=50 => 1024,
        51..=100 => 512,
        101..=200 => 256,
        201..=400 => 128,
        401..=800 => 64,
        801..=1000 => 32,
        _ => return None,
    })
}

/// Ports that each member of this pool is entitled to, for each protocol, over all its frontends.
pub fn entitlement(pool: &Pool) -> Result<u32, CompileError> {
    let manual = pool.allocated_outbound_ports;
    if !manual.is_multiple_of(UNIT_PORTS) {
        return Err(CompileError::coded(
            NOT_A_MULTIPLE,
            &pool.place,
            format!("allocatedOutboundPorts is {manual}; ports are handed out in units of 8"),
        ));
    }
    if manual != 0 {
        return Ok(manual);
    }
    let members = pool.members.len();
    let tier = tier(members).ok_or_else(|| {
        let message =
            format!("{members} members; a pool has at most 1,000 unless allocatedOutboundPorts is set");
        CompileError::new(&pool.place, message)
    })?;
    let frontends = pool.frontends.len() as u32;
    Ok(match pool.allocation {
        Allocation::Min1024 => (tier * frontends).min(MOST),
        Allocation::Multiply => tier * frontends,
        Allocation::Basic => tier,
    })
}
