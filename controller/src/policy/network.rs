//! The validated policy: names resolved to indices, ranges merged, defaults filled in.
//!
//! `policy` makes it from YAML, `compile` turns it into tables. Nothing in here can refer to something that does
//! not exist; whoever builds one by hand (tests) keeps that promise by indexing correctly.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Arc;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// A whole policy. Indices (`usize`) point into the vectors of this struct.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Network {
    pub virtual_networks: Vec<VirtualNetwork>,
    pub subnets: Vec<Subnet>,
    pub interfaces: Vec<Interface>,
    pub groups: Vec<SecurityGroup>,
    pub application_groups: Vec<ApplicationGroup>,
    /// Service tags of the tag file and of the policy itself; the built-in ones are not in here.
    pub tags: Vec<TagDefinition>,
    /// The tag file they are from, if there is one.
    pub tag_file: Option<PathBuf>,
    pub route_tables: Vec<RouteTable>,
    pub platform: Platform,
    pub on_rule_change: OnRuleChange,
    pub limits: Limits,
    pub public_addresses: Vec<PublicAddress>,
    pub load_balancers: Vec<LoadBalancer>,
    pub default_outbound: Option<DefaultOutbound>,
    pub snat: Snat,
    pub uplinks: Vec<Uplink>,
    pub host_access: HostAccess,
    pub timeouts: Timeouts,
    pub flow_table: FlowTable,
    pub adoption: Adoption,
}

/// An address space; its position + 1 in `Network::virtual_networks` is *not* its network id, `id` is.
#[derive(Debug, Clone, PartialEq)]
pub struct VirtualNetwork {
    pub name: String,
    /// 1..=65535, stable for a name within one policy; 0 means "the world" inside the datapath.
    pub id: u16,
    /// Both families.
    pub address_space: Vec<IpNet>,
    /// Virtual networks this one is peered with, in both directions, sorted; their spaces do not overlap with this one's.
    pub peers: Vec<usize>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Subnet {
    pub name: String,
    pub network: usize,
    pub prefixes: Vec<IpNet>,
    /// The address guests use as their router; the first usable one of the prefix unless given. IPv4 first.
    pub gateways: Vec<IpAddr>,
    pub group: Option<usize>,
    pub route_table: Option<usize>,
    /// Azure's `defaultOutboundAccess`: may its guests leave under the shared address ([`Network::default_outbound`])? Off
    /// unless asked.
    pub default_outbound: bool,
}

/// User-defined routes of the subnets that name the table (`reference/azure.md` §1.4, §2.1).
#[derive(Debug, Clone, PartialEq)]
pub struct RouteTable {
    pub name: String,
    pub routes: Vec<Route>,
    /// Does a default route make `VirtualNetwork` mean everything, as it does in Azure? Off unless asked.
    pub widen_virtual_network: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Route {
    pub name: String,
    pub prefix: IpNet,
    pub next_hop: RouteHop,
}

/// Where a route leads; Azure's `nextHopType`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteHop {
    /// Inside the virtual network, as without the route.
    VnetLocal,
    /// Out, by whatever way out the guest has.
    Internet,
    /// To the guest with this address in the same or a peered virtual network.
    VirtualAppliance(IpAddr),
    /// Towards networks behind a VPN or private line.
    VirtualNetworkGateway,
    /// Nowhere: dropped.
    None,
}

/// One guest's attachment (design §2).
#[derive(Debug, Clone, PartialEq)]
pub struct Interface {
    pub name: String,
    pub device: String,
    /// Pinned hardware address; learned from the guest's ARP when absent.
    pub mac: Option<[u8; 6]>,
    pub hook: Hook,
    pub group: Option<usize>,
    pub addresses: Vec<IpConfiguration>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct IpConfiguration {
    pub name: String,
    pub address: IpAddr,
    pub subnet: usize,
    pub public_address: Option<usize>,
    /// Application security groups it is a member of, sorted.
    pub application_groups: Vec<usize>,
}

/// A set of IP configurations that rules name instead of addresses. Its members are those that name it.
#[derive(Debug, Clone, PartialEq)]
pub struct ApplicationGroup {
    pub name: String,
    /// The virtual network of its members, none as long as it has no member. It means nothing in another network.
    pub network: Option<usize>,
}

/// A service tag and what it stands for.
#[derive(Debug, Clone, PartialEq)]
pub struct TagDefinition {
    pub name: String,
    /// Both families, as published.
    pub prefixes: Arc<[IpNet]>,
}

/// Rules before the groups, and the platform's own services (design §4).
#[derive(Debug, Clone, PartialEq)]
pub struct Platform {
    /// Outbound TCP 1688 to `kms_servers` passes whatever the groups say, unless a rule names `AzurePlatformLKM`.
    pub allow_kms: bool,
    /// What `AzurePlatformLKM` stands for.
    pub kms_servers: Vec<IpNet>,
    /// TCP 25 out of the virtual network is blocked whatever the groups say.
    pub block_smtp: bool,
    /// What this host serves under 168.63.129.16 and 169.254.169.254.
    pub services: Vec<PlatformService>,
}

impl Default for Platform {
    fn default() -> Self {
        let kms = [[23, 102, 135, 246], [20, 118, 99, 224], [40, 83, 235, 53]];
        Self {
            allow_kms: false,
            kms_servers: kms.map(|a| IpNet::from(IpAddr::from(a))).to_vec(),
            block_smtp: false,
            services: Vec::new(),
        }
    }
}

/// A service of this host under a platform address.
#[derive(Debug, Clone, PartialEq)]
pub struct PlatformService {
    pub name: String,
    /// 168.63.129.16 or 169.254.169.254.
    pub address: Ipv4Addr,
    pub protocol: TransportProtocol,
    pub port: u16,
}

/// What a change of rules does to flows that live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum OnRuleChange {
    /// They stay until they end, as Azure documents.
    #[default]
    Keep,
    /// The initiator's next packet is judged again.
    Reevaluate,
}

/// Azure's limits (`reference/azure.md` §1.2), which a policy may raise.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub network_security_groups: u32,
    pub rules_per_group: u32,
    /// Addresses and prefixes of all rules of a group, for sources and for destinations each; tags do not count.
    pub prefixes_per_group: u32,
    pub application_groups: u32,
    pub application_groups_per_configuration: u32,
    pub application_groups_per_rule: u32,
    pub application_groups_per_group: u32,
    pub configurations_per_application_group: u32,
    /// Kernel memory one generation of tables may take, in MiB.
    pub policy_memory_mib: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            network_security_groups: 5000,
            rules_per_group: 1000,
            prefixes_per_group: 4000,
            application_groups: 3000,
            application_groups_per_configuration: 20,
            application_groups_per_rule: 10,
            application_groups_per_group: 100,
            configurations_per_application_group: 4000,
            policy_memory_mib: 512,
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct SecurityGroup {
    pub name: String,
    /// As written, in the order of the file; `compile` sorts them. Default rules are not in here.
    pub rules: Vec<SecurityRule>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct SecurityRule {
    pub name: String,
    pub description: String,
    /// 100..=4096, unique per direction within a group.
    pub priority: u16,
    pub direction: Direction,
    pub access: Access,
    pub protocol: RuleProtocol,
    pub source: Vec<AddressMatch>,
    pub destination: Vec<AddressMatch>,
    /// Inclusive ranges, sorted and merged; `[(0, 65535)]` is any.
    pub source_ports: Vec<(u16, u16)>,
    pub destination_ports: Vec<(u16, u16)>,
}

/// One term of a rule's source or destination; a side matches when any term does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AddressMatch {
    Any,
    Prefix(IpNet),
    Tag(ServiceTag),
    /// Index into the policy's application security groups.
    Application(usize),
}

/// What a rule may name instead of addresses (`reference/azure.md` §1.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ServiceTag {
    /// Own, peered and routed space of the subnet, and 168.63.129.16.
    VirtualNetwork,
    /// Public addresses outside the virtual network and its peers.
    Internet,
    /// 168.63.129.16, from where probes come.
    AzureLoadBalancer,
    /// Outbound: 168.63.129.16, port 53.
    AzurePlatformDns,
    /// Outbound: 169.254.169.254.
    AzurePlatformImds,
    /// Outbound: the KMS servers.
    AzurePlatformLkm,
    /// Index into the policy's tags.
    Named(usize),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Direction {
    Inbound,
    Outbound,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Access {
    Allow,
    Deny,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RuleProtocol {
    Any,
    Tcp,
    Udp,
    Icmp,
    Esp,
    Ah,
}

#[derive(Debug, Clone, PartialEq)]
pub struct PublicAddress {
    pub name: String,
    pub address: IpAddr,
    pub announce: Announce,
}

/// How the world finds a public address (design §4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Announce {
    /// It is (or is made) an address of this host's uplink; the kernel answers ARP and may use it too.
    Address,
    /// The datapath answers ARP for it on the uplinks; the host does not own it.
    Proxy,
    /// The world routes it here; nobody answers ARP.
    Routed,
}

/// The way out of guests that have no other, in subnets that allow it (scenario 3 of `reference/azure.md` §2.1).
#[derive(Debug, Clone, PartialEq)]
pub struct DefaultOutbound {
    /// At most one of each family; used for nothing else.
    pub public_addresses: Vec<usize>,
    /// 240..=7200; `None`: `timeouts` of the policy hold.
    pub idle_timeout_seconds: Option<u32>,
}

/// What holds for all SNAT ports of a policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Snat {
    pub refusal: Refusal,
    /// How long flows on reclaimed ports may go on before they are ended.
    pub drain_seconds: u32,
    /// UDP: how long a port stays with its inside socket after the last flow's end; 0 but for the profile `natgateway`.
    pub udp_hold_seconds: u32,
    /// A TCP port serves one inside socket towards everybody, instead of one flow towards each destination (profile `rfc`).
    pub tcp_port_per_socket: bool,
    pub filtering: Filtering,
    /// Guests are told of every flow that is refused, not only for want of a port (profile `rfc`).
    pub tell_every_refusal: bool,
}

/// Who may send to a public port that SNAT gave to an inside socket (RFC 4787 §5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Filtering {
    /// Whom the socket has sent to, from that address and port.
    #[default]
    AddressAndPort,
    /// Anybody, as far as the guest's groups let a stranger in.
    EndpointIndependent,
}

impl Default for Snat {
    fn default() -> Self {
        Self {
            refusal: Refusal::Silent,
            drain_seconds: 3600,
            udp_hold_seconds: 0,
            tcp_port_per_socket: false,
            filtering: Filtering::AddressAndPort,
            tell_every_refusal: false,
        }
    }
}

/// What a guest is told whose flow is refused for want of a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Refusal {
    /// Nothing, as Azure.
    #[default]
    Silent,
    /// ICMP type 3 code 13, or ICMPv6 type 1 code 1 (RFC 6888 REQ-11, RFC 5508 REQ-8).
    Icmp,
    /// A RST to TCP, ICMP to others.
    Reset,
}

#[derive(Debug, Clone, PartialEq)]
pub struct LoadBalancer {
    pub name: String,
    pub frontends: Vec<Frontend>,
    pub pools: Vec<BackendPool>,
    pub outbound_rules: Vec<OutboundRule>,
    pub rules: Vec<LoadBalancingRule>,
    pub nat_rules: Vec<InboundNatRule>,
    pub probes: Vec<Probe>,
    pub allocation: Allocation,
    pub frontend_use: FrontendUse,
}

/// How many ports a member gets by default when its pool has several frontends (`reference/azure.md` §2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Allocation {
    /// The tier times the frontends, at most 1,024: Azure since 2023.
    #[default]
    Min1024,
    /// The tier on each frontend: Azure's Standard load balancer of 2019.
    Multiply,
    /// One frontend for the pool, chosen at random and for good: the Basic load balancer.
    Basic,
}

/// In which order a member's ports on several frontends are used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum FrontendUse {
    /// One frontend after the other, as Azure does.
    #[default]
    Sequential,
    /// All at once.
    Spread,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Frontend {
    pub name: String,
    /// All of one family; several if it is a public IP prefix, which only outbound rules may use.
    pub public_addresses: Vec<usize>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct BackendPool {
    pub name: String,
    /// (interface, its ip configuration). A pool may have members of both families; each rule serves those of its
    /// frontends' family.
    pub members: Vec<(usize, usize)>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct OutboundRule {
    pub name: String,
    /// Indices into the load balancer's `frontends`, all of one family.
    pub frontends: Vec<usize>,
    /// Index into the load balancer's `pools`.
    pub pool: usize,
    pub protocol: TransportProtocol,
    /// Ports per member; 0 asks for the tier of the pool's size.
    pub allocated_outbound_ports: u32,
    /// 240..=7200; `None`: `timeouts` of the policy hold.
    pub idle_timeout_seconds: Option<u32>,
    /// Both sides get a RST when an established TCP flow ends by its idle timeout.
    pub tcp_reset: bool,
}

/// What arrives at a frontend's port goes to one of a pool's members.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadBalancingRule {
    pub name: String,
    /// Index into the load balancer's `frontends`; that frontend has one address.
    pub frontend: usize,
    /// Index into the load balancer's `pools`.
    pub pool: usize,
    /// Tcp or Udp; `All` (HA ports) is for internal load balancers, which there are none of.
    pub protocol: TransportProtocol,
    pub frontend_port: u16,
    pub backend_port: u16,
    pub distribution: Distribution,
    /// 240..=1800; `None`: `timeouts` of the policy hold.
    pub idle_timeout_seconds: Option<u32>,
    pub tcp_reset: bool,
    /// The packet keeps the frontend's address as destination (`enableFloatingIP`).
    pub floating_ip: bool,
    /// The rule gives its pool no outbound ports.
    pub disable_outbound_snat: bool,
    /// Index into the load balancer's `probes`.
    pub probe: Option<usize>,
}

/// Which packets go to the same member; Azure's `loadDistribution`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Distribution {
    /// Those of one flow: by all five fields.
    #[default]
    Default,
    /// Those of one client: by source and destination address.
    #[serde(rename = "SourceIP")]
    SourceIp,
    /// Those of one client and protocol.
    #[serde(rename = "SourceIPProtocol")]
    SourceIpProtocol,
}

/// What arrives at a frontend's port, or at one of a range, goes to one member.
#[derive(Debug, Clone, PartialEq)]
pub struct InboundNatRule {
    pub name: String,
    /// Index into the load balancer's `frontends`; that frontend has one address.
    pub frontend: usize,
    /// Tcp, Udp or both.
    pub protocol: TransportProtocol,
    pub backend_port: u16,
    pub idle_timeout_seconds: Option<u32>,
    pub tcp_reset: bool,
    pub floating_ip: bool,
    pub target: NatTarget,
}

#[derive(Debug, Clone, PartialEq)]
pub enum NatTarget {
    Single {
        frontend_port: u16,
        /// (interface, its ip configuration).
        member: (usize, usize),
    },
    /// Each member of the pool gets one port of the range and keeps it.
    Range {
        first: u16,
        /// Inclusive.
        last: u16,
        pool: usize,
    },
}

/// How a backend's health is found out.
#[derive(Debug, Clone, PartialEq)]
pub struct Probe {
    pub name: String,
    pub protocol: ProbeProtocol,
    pub port: u16,
    /// At least 5, as in Azure.
    pub interval_seconds: u32,
    /// So many results in a row change the state; Azure's `probeThreshold`, before `numberOfProbes`.
    pub threshold: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeProtocol {
    /// A handshake.
    Tcp,
    /// GET of this path, answered 200.
    Http { path: String },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum TransportProtocol {
    Tcp,
    Udp,
    All,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Uplink {
    pub device: String,
    pub hook: Hook,
    /// May the host's `ip_local_reserved_ports` be set so that frontends on this host's own address get all ports?
    pub reserve_host_ports: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Hook {
    #[default]
    Auto,
    Xdp,
    Tc,
}

/// What guests may ask of the host itself (design §4, "between host and guest").
#[derive(Debug, Clone, PartialEq)]
pub struct HostAccess {
    pub dhcp: bool,
    pub dns: bool,
    pub echo: bool,
    /// Further services: protocol (Tcp or Udp) and inclusive port range.
    pub services: Vec<(TransportProtocol, u16, u16)>,
}

impl Default for HostAccess {
    fn default() -> Self {
        Self { dhcp: true, dns: true, echo: true, services: Vec::new() }
    }
}

/// Idle and closing timers, in seconds (`reference/azure.md` §2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    pub tcp_established: u32,
    pub tcp_half_open: u32,
    pub tcp_fin: u32,
    pub tcp_reset: u32,
    /// After a RST that is not shown to be the other end's.
    pub tcp_transitory: u32,
    pub udp: u32,
    pub icmp: u32,
    pub other: u32,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            tcp_established: 240,
            tcp_half_open: 30,
            tcp_fin: 240,
            tcp_reset: 15,
            tcp_transitory: 240,
            udp: 240,
            icmp: 60,
            other: 240,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowTable {
    /// Flows (pairs of half-records) the table must be able to hold.
    pub max_flows: u32,
    /// The same for IPv6, whose records are twice as large and have a table of their own.
    pub max_flows_v6: u32,
    /// Flows of IPv4 that one guest may hold.
    pub max_flows_per_guest: u32,
    /// The same for IPv6.
    pub max_flows_per_guest_v6: u32,
}

/// What one guest may hold of a table for so many flows unless the policy says otherwise: a quarter, so that three of them
/// leave room for the others, but at least 1,024.
pub const fn flows_per_guest(max_flows: u32) -> u32 {
    if max_flows < 4096 { 1024 } else { max_flows / 4 }
}

impl Default for FlowTable {
    fn default() -> Self {
        let (max_flows, max_flows_v6) = (262_144, 65_536);
        Self {
            max_flows,
            max_flows_v6,
            max_flows_per_guest: flows_per_guest(max_flows),
            max_flows_per_guest_v6: flows_per_guest(max_flows_v6),
        }
    }
}

/// What becomes of connections that are older than the first start (ADR 0011).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Adoption {
    /// For so long TCP connections that need no translation of ports are adopted, and guests told by a RST that others are
    /// gone. 0: neither, and nothing is taken over from conntrack.
    pub grace_seconds: u32,
}

impl Default for Adoption {
    fn default() -> Self {
        Self { grace_seconds: 300 }
    }
}

/// Where things stand in the files, so that later stages (compile, plan) can point at them.
/// Key: a path such as `loadBalancers/lb/outboundRules/out`; value: (file, line, column), 1-based.
pub type Places = BTreeMap<String, (String, usize, usize)>;

/// The first address of a prefix that Azure hands to its router.
pub fn default_gateway(prefix: &IpNet) -> Option<IpAddr> {
    match prefix {
        IpNet::V4(net) if net.prefix_len() <= 30 => {
            Some(IpAddr::V4(Ipv4Addr::from(u32::from(net.network()) + 1)))
        }
        IpNet::V4(_) => None,
        IpNet::V6(net) => Some(IpAddr::V6((u128::from(net.network()) + 1).into())),
    }
}
