//! Owned units on disk: runs of neighbouring units with one owner, so that a member's block is one line and not 128.

use std::collections::BTreeMap;

use portcullis_common::policy::ADDRESS_UNITS;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::Owner;

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Run {
    first: u16,
    /// Inclusive.
    last: u16,
    member: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    draining_until: Option<u64>,
}

pub(super) fn serialize<S: Serializer>(
    units: &BTreeMap<u16, Owner>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let mut runs: Vec<Run> = Vec::new();
    for (&unit, owner) in units {
        match runs.last_mut() {
            Some(run)
                if run.last + 1 == unit
                    && run.member == owner.member
                    && run.draining_until == owner.draining_until =>
            {
                run.last = unit
            }
            _ => {
                let (member, draining_until) = (owner.member.clone(), owner.draining_until);
                runs.push(Run { first: unit, last: unit, member, draining_until });
            }
        }
    }
    runs.serialize(serializer)
}

pub(super) fn deserialize<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<BTreeMap<u16, Owner>, D::Error> {
    let mut units = BTreeMap::new();
    for run in Vec::<Run>::deserialize(deserializer)? {
        if run.first > run.last || u32::from(run.last) >= ADDRESS_UNITS {
            return Err(D::Error::custom(format!("{}..={} is no run of units", run.first, run.last)));
        }
        for unit in run.first..=run.last {
            let owner = Owner { member: run.member.clone(), draining_until: run.draining_until };
            if units.insert(unit, owner).is_some() {
                return Err(D::Error::custom(format!("unit {unit} has two owners")));
            }
        }
    }
    Ok(units)
}

#[cfg(test)]
mod tests {
    use super::super::{AddressUnits, Owner};

    #[test]
    fn a_block_is_one_run_and_what_cannot_be_is_refused() {
        let owner = |member: &str, draining_until| Owner { member: member.into(), draining_until };
        let mut units = AddressUnits::default();
        units.tcp.extend((128..256).map(|unit| (unit, owner("vm1/a", None))));
        units.tcp.insert(256, owner("vm1/a", Some(7)));
        units.udp.insert(8191, owner("vm2/a", None));
        let text = serde_json::to_string(&units).unwrap();
        assert_eq!(
            text,
            r#"{"tcp":[{"first":128,"last":255,"member":"vm1/a"},{"first":256,"last":256,"member":"vm1/a","drainingUntil":7}],"udp":[{"first":8191,"last":8191,"member":"vm2/a"}]}"#
        );
        assert_eq!(serde_json::from_str::<AddressUnits>(&text).unwrap(), units);
        for (from, to) in [("255", "65535"), ("255", "127"), ("255", "256")] {
            let wrong = text.replacen(&format!("\"last\":{from}"), &format!("\"last\":{to}"), 1);
            assert!(serde_json::from_str::<AddressUnits>(&wrong).is_err(), "{wrong}");
        }
    }
}
