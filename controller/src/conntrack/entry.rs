//! One connection as ctnetlink tells of it (`linux/netfilter/nfnetlink_conntrack.h`).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// One direction of a connection. Ports in native order; of a ping `source_port` is the identifier of the request,
/// `destination_port` that of the answer, the other is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tuple {
    pub source: IpAddr,
    pub destination: IpAddr,
    pub source_port: u16,
    pub destination_port: u16,
    /// IANA protocol number.
    pub protocol: u8,
}

/// A connection the kernel tracks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection {
    /// As whoever opened it sends.
    pub original: Tuple,
    /// As the answers arrive, before they are translated back.
    pub reply: Tuple,
    /// `TCP_CONNTRACK_*`; `None` unless it is TCP.
    pub tcp_state: Option<u8>,
}

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_PROTOINFO: u16 = 4;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
const CTA_PROTO_ICMP_ID: u16 = 4;
const CTA_PROTO_ICMP_TYPE: u16 = 5;
const CTA_PROTOINFO_TCP: u16 = 1;
const CTA_PROTOINFO_TCP_STATE: u16 = 1;
const ECHO_REQUEST: u8 = 8;
const ECHO_REPLY: u8 = 0;
/// Type and length before an attribute's value.
const HEADER: usize = 4;
/// The upper two bits of a type are flags (nested, network order).
const TYPE: u16 = 0x3fff;

/// The attributes in `bytes`, as far as they are whole.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?);
        let value = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind & TYPE, value))
    })
}

impl Connection {
    /// Reads what stands behind the `nfgenmsg` of a message; `None` for what is no connection of TCP, UDP or ping, or not whole.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let (mut original, mut reply, mut tcp_state) = (None, None, None);
        for (kind, value) in attributes(bytes) {
            match kind {
                CTA_TUPLE_ORIG => original = Tuple::parse(value),
                CTA_TUPLE_REPLY => reply = Tuple::parse(value),
                CTA_PROTOINFO => {
                    let tcp = attributes(value).find(|(kind, _)| *kind == CTA_PROTOINFO_TCP);
                    let state = tcp.and_then(|(_, tcp)| {
                        attributes(tcp).find(|(kind, _)| *kind == CTA_PROTOINFO_TCP_STATE)
                    });
                    tcp_state = state.and_then(|(_, state)| state.first().copied());
                }
                _ => {}
            }
        }
        let (original, reply): (Tuple, Tuple) = (original?, reply?);
        (original.protocol == reply.protocol).then_some(Self { original, reply, tcp_state })
    }
}

impl Tuple {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (mut source, mut destination, mut protocol) = (None, None, None);
        let (mut ports, mut icmp) = ([None; 2], (None, None));
        let port = |value: &[u8]| Some(u16::from_be_bytes(*value.first_chunk()?));
        for (kind, value) in attributes(bytes) {
            match kind {
                CTA_TUPLE_IP => {
                    for (kind, value) in attributes(value) {
                        match kind {
                            CTA_IP_V4_SRC => source = v4(value),
                            CTA_IP_V4_DST => destination = v4(value),
                            CTA_IP_V6_SRC => source = v6(value),
                            CTA_IP_V6_DST => destination = v6(value),
                            _ => {}
                        }
                    }
                }
                CTA_TUPLE_PROTO => {
                    for (kind, value) in attributes(value) {
                        match kind {
                            CTA_PROTO_NUM => protocol = value.first().copied(),
                            CTA_PROTO_SRC_PORT => ports[0] = port(value),
                            CTA_PROTO_DST_PORT => ports[1] = port(value),
                            CTA_PROTO_ICMP_ID => icmp.0 = port(value),
                            CTA_PROTO_ICMP_TYPE => icmp.1 = value.first().copied(),
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        let protocol = protocol?;
        let (source_port, destination_port) = match (protocol, icmp) {
            (6 | 17, _) => (ports[0]?, ports[1]?),
            (1, (Some(id), Some(ECHO_REQUEST))) => (id, 0),
            (1, (Some(id), Some(ECHO_REPLY))) => (0, id),
            _ => return None,
        };
        Some(Self { source: source?, destination: destination?, source_port, destination_port, protocol })
    }
}

fn v4(value: &[u8]) -> Option<IpAddr> {
    Some(Ipv4Addr::from(*value.first_chunk::<4>()?).into())
}

fn v6(value: &[u8]) -> Option<IpAddr> {
    Some(Ipv6Addr::from(*value.first_chunk::<16>()?).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = ((value.len() + HEADER) as u16).to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn tuple(kind: u16, from: [u8; 4], to: [u8; 4], protocol: &[(u16, &[u8])]) -> Vec<u8> {
        let ip = [attribute(CTA_IP_V4_SRC, &from), attribute(CTA_IP_V4_DST, &to)].concat();
        let proto: Vec<u8> = protocol.iter().flat_map(|(kind, value)| attribute(*kind, value)).collect();
        attribute(
            kind | 0x8000,
            &[attribute(CTA_TUPLE_IP | 0x8000, &ip), attribute(CTA_TUPLE_PROTO | 0x8000, &proto)].concat(),
        )
    }

    fn masqueraded() -> Vec<u8> {
        let state = attribute(CTA_PROTOINFO_TCP_STATE, &[3]);
        [
            tuple(
                CTA_TUPLE_ORIG,
                [10, 0, 0, 4],
                [198, 51, 100, 1],
                &[
                    (CTA_PROTO_NUM, &[6]),
                    (CTA_PROTO_SRC_PORT, &40000u16.to_be_bytes()),
                    (CTA_PROTO_DST_PORT, &[0, 80]),
                ],
            ),
            tuple(
                CTA_TUPLE_REPLY,
                [198, 51, 100, 1],
                [203, 0, 113, 10],
                &[
                    (CTA_PROTO_NUM, &[6]),
                    (CTA_PROTO_SRC_PORT, &[0, 80]),
                    (CTA_PROTO_DST_PORT, &61000u16.to_be_bytes()),
                ],
            ),
            attribute(CTA_PROTOINFO | 0x8000, &attribute(CTA_PROTOINFO_TCP | 0x8000, &state)),
        ]
        .concat()
    }

    #[test]
    fn a_masqueraded_connection_is_read_with_both_tuples_and_its_state() {
        let read = Connection::parse(&masqueraded()).unwrap();
        assert_eq!((read.original.source_port, read.reply.destination_port), (40000, 61000));
        assert_eq!(read.reply.destination, IpAddr::from([203, 0, 113, 10]));
        assert_eq!(read.tcp_state, Some(3));
    }

    #[test]
    fn a_ping_has_its_identifier_where_flows_have_it() {
        let id = |kind, id: u16, icmp| {
            let (from, to) = ([10, 0, 0, 4], [198, 51, 100, 1]);
            let id = id.to_be_bytes();
            let values: [(u16, &[u8]); 3] =
                [(CTA_PROTO_NUM, &[1]), (CTA_PROTO_ICMP_ID, &id), (CTA_PROTO_ICMP_TYPE, icmp)];
            tuple(kind, from, to, &values)
        };
        let bytes = [id(CTA_TUPLE_ORIG, 7, &[8]), id(CTA_TUPLE_REPLY, 9, &[0])].concat();
        let read = Connection::parse(&bytes).unwrap();
        assert_eq!((read.original.source_port, read.original.destination_port), (7, 0));
        assert_eq!((read.reply.source_port, read.reply.destination_port), (0, 9));
    }

    #[test]
    fn whatever_is_cut_off_or_wrong_is_read_as_nothing_or_less_and_never_panics() {
        let whole = masqueraded();
        for end in 0..whole.len() {
            let _ = Connection::parse(&whole[..end]);
        }
        for at in 0..whole.len() {
            for byte in [0, 1, 3, 0x7f, 0xff] {
                let mut wrong = whole.clone();
                wrong[at] = byte;
                let _ = Connection::parse(&wrong);
            }
        }
        assert_eq!(Connection::parse(&whole[..60]), None, "without the answer's tuple");
    }
}
