//! ICMP errors, of which the content is still to come: refused under their own names, never leaked, and left to the kernel
//! where they are the host's. IPv6 refuses them in [`super::entry6`].

use super::{Context, Verdict, end, fragments};
use crate::env::Env;
use crate::family::V4;
use crate::packet::Packet;
use crate::packet::parse::SHAPE_ICMP_ERROR;
use crate::reason::Reason;

/// ICMP that is not echo.
#[inline(always)]
pub fn icmp<P: Packet, E: Env>(_packet: &P, env: &E, ctx: &mut Context) -> Verdict {
    let reason = if ctx.shape & SHAPE_ICMP_ERROR != 0 { Reason::IcmpError } else { Reason::IcmpType };
    let ended = fragments::refuse::<V4, E>(env, ctx, reason);
    end(env, ctx, ended)
}
