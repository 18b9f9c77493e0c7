//! Which fields each object of a policy has. The reader goes by this list, and a test holds the JSON Schema to it.

/// One kind of object.
#[derive(Debug)]
pub struct Shape {
    /// The definition's name in the JSON Schema.
    #[cfg_attr(not(test), allow(dead_code, reason = "only the test that compares with the schema asks"))]
    pub schema: &'static str,
    /// What messages call it.
    pub what: &'static str,
    pub fields: &'static [&'static str],
    /// Fields that must be there whatever else is. (`addressPrefix` *or* `addressPrefixes` is checked by the reader.)
    pub required: &'static [&'static str],
}

pub const POLICY: Shape = Shape {
    schema: "Policy",
    what: "policy",
    fields: &[
        "virtualNetworks",
        "networkInterfaces",
        "networkSecurityGroups",
        "publicIPAddresses",
        "publicIPPrefixes",
        "loadBalancers",
        "defaultOutbound",
        "snat",
        "uplinks",
        "hostAccess",
        "timeouts",
        "flowTable",
        "adoption",
        "applicationSecurityGroups",
        "serviceTags",
        "routeTables",
        "platformRules",
        "platformServices",
        "onRuleChange",
        "limits",
    ],
    required: &[],
};

pub const VIRTUAL_NETWORK: Shape = Shape {
    schema: "VirtualNetwork",
    what: "virtual network",
    fields: &["name", "addressSpace", "virtualNetworkPeerings", "subnets"],
    required: &["name", "addressSpace"],
};

pub const PEERING: Shape = Shape {
    schema: "VirtualNetworkPeering",
    what: "peering",
    fields: &["name", "remoteVirtualNetwork"],
    required: &["name", "remoteVirtualNetwork"],
};

pub const ADDRESS_SPACE: Shape = Shape {
    schema: "AddressSpace",
    what: "address space",
    fields: &["addressPrefixes"],
    required: &["addressPrefixes"],
};

pub const SUBNET: Shape = Shape {
    schema: "Subnet",
    what: "subnet",
    fields: &[
        "name",
        "addressPrefix",
        "addressPrefixes",
        "gateway",
        "networkSecurityGroup",
        "routeTable",
        "defaultOutboundAccess",
    ],
    required: &["name"],
};

pub const NETWORK_INTERFACE: Shape = Shape {
    schema: "NetworkInterface",
    what: "network interface",
    fields: &["name", "device", "macAddress", "hook", "networkSecurityGroup", "ipConfigurations"],
    required: &["name", "device", "ipConfigurations"],
};

pub const IP_CONFIGURATION: Shape = Shape {
    schema: "IpConfiguration",
    what: "ip configuration",
    fields: &["name", "subnet", "privateIPAddress", "publicIPAddress", "applicationSecurityGroups"],
    required: &["subnet", "privateIPAddress"],
};

pub const SECURITY_GROUP: Shape = Shape {
    schema: "NetworkSecurityGroup",
    what: "network security group",
    fields: &["name", "securityRules"],
    required: &["name"],
};

pub const SECURITY_RULE: Shape = Shape {
    schema: "SecurityRule",
    what: "security rule",
    fields: &[
        "name",
        "description",
        "priority",
        "direction",
        "access",
        "protocol",
        "sourceAddressPrefix",
        "sourceAddressPrefixes",
        "sourceApplicationSecurityGroups",
        "sourcePortRange",
        "sourcePortRanges",
        "destinationAddressPrefix",
        "destinationAddressPrefixes",
        "destinationApplicationSecurityGroups",
        "destinationPortRange",
        "destinationPortRanges",
    ],
    required: &["name", "priority", "direction", "access", "protocol"],
};

pub const APPLICATION_SECURITY_GROUP: Shape = Shape {
    schema: "ApplicationSecurityGroup",
    what: "application security group",
    fields: &["name"],
    required: &["name"],
};

pub const SERVICE_TAGS: Shape = Shape {
    schema: "ServiceTags",
    what: "section of service tags",
    fields: &["file", "tags"],
    required: &[],
};

pub const SERVICE_TAG: Shape = Shape {
    schema: "ServiceTag",
    what: "service tag",
    fields: &["name", "addressPrefixes"],
    required: &["name", "addressPrefixes"],
};

pub const ROUTE_TABLE: Shape = Shape {
    schema: "RouteTable",
    what: "route table",
    fields: &["name", "widenVirtualNetwork", "routes"],
    required: &["name"],
};

pub const ROUTE: Shape = Shape {
    schema: "Route",
    what: "route",
    fields: &["name", "addressPrefix", "nextHopType", "nextHopIpAddress"],
    required: &["name", "addressPrefix", "nextHopType"],
};

pub const PLATFORM_RULES: Shape = Shape {
    schema: "PlatformRules",
    what: "section of platform rules",
    fields: &["allowKms", "kmsServers", "blockSmtp25"],
    required: &[],
};

pub const PLATFORM_SERVICE: Shape = Shape {
    schema: "PlatformService",
    what: "platform service",
    fields: &["name", "address", "protocol", "port"],
    required: &["name", "address", "protocol", "port"],
};

pub const LIMITS: Shape = Shape {
    schema: "Limits",
    what: "section of limits",
    fields: &[
        "networkSecurityGroups",
        "securityRulesPerGroup",
        "addressPrefixesPerGroup",
        "applicationSecurityGroups",
        "applicationSecurityGroupsPerIpConfiguration",
        "applicationSecurityGroupsPerRule",
        "applicationSecurityGroupsPerGroup",
        "ipConfigurationsPerApplicationSecurityGroup",
        "policyMemoryMiB",
    ],
    required: &[],
};

pub const PUBLIC_ADDRESS: Shape = Shape {
    schema: "PublicIPAddress",
    what: "public IP address",
    fields: &["name", "ipAddress", "announce"],
    required: &["name", "ipAddress", "announce"],
};

pub const PUBLIC_PREFIX: Shape = Shape {
    schema: "PublicIPPrefix",
    what: "public IP prefix",
    fields: &["name", "ipPrefix", "announce"],
    required: &["name", "ipPrefix", "announce"],
};

pub const DEFAULT_OUTBOUND: Shape = Shape {
    schema: "DefaultOutbound",
    what: "default outbound",
    fields: &["publicIPAddress", "publicIPAddressIPv6", "idleTimeoutInMinutes"],
    required: &[],
};

pub const SNAT: Shape = Shape {
    schema: "Snat",
    what: "section of SNAT",
    fields: &["profile", "filtering", "onExhaustion", "drainMinutes"],
    required: &[],
};

pub const LOAD_BALANCER: Shape = Shape {
    schema: "LoadBalancer",
    what: "load balancer",
    fields: &[
        "name",
        "snatAllocation",
        "frontendUse",
        "frontendIPConfigurations",
        "backendAddressPools",
        "probes",
        "loadBalancingRules",
        "inboundNatRules",
        "outboundRules",
    ],
    required: &["name", "frontendIPConfigurations"],
};

pub const FRONTEND: Shape = Shape {
    schema: "FrontendIPConfiguration",
    what: "frontend",
    fields: &["name", "publicIPAddress", "publicIPPrefix"],
    required: &["name"],
};

pub const BACKEND_POOL: Shape = Shape {
    schema: "BackendAddressPool",
    what: "backend pool",
    fields: &["name", "backendIPConfigurations"],
    required: &["name"],
};

pub const OUTBOUND_RULE: Shape = Shape {
    schema: "OutboundRule",
    what: "outbound rule",
    fields: &[
        "name",
        "frontendIPConfigurations",
        "backendAddressPool",
        "protocol",
        "allocatedOutboundPorts",
        "idleTimeoutInMinutes",
        "enableTcpReset",
    ],
    required: &["name", "frontendIPConfigurations", "backendAddressPool", "protocol"],
};

pub const PROBE: Shape = Shape {
    schema: "Probe",
    what: "probe",
    fields: &[
        "name",
        "protocol",
        "port",
        "requestPath",
        "intervalInSeconds",
        "probeThreshold",
        "numberOfProbes",
    ],
    required: &["name", "protocol", "port"],
};

pub const LOAD_BALANCING_RULE: Shape = Shape {
    schema: "LoadBalancingRule",
    what: "load balancing rule",
    fields: &[
        "name",
        "frontendIPConfiguration",
        "backendAddressPool",
        "protocol",
        "frontendPort",
        "backendPort",
        "probe",
        "loadDistribution",
        "idleTimeoutInMinutes",
        "enableTcpReset",
        "enableFloatingIP",
        "disableOutboundSnat",
    ],
    required: &["name", "frontendIPConfiguration", "backendAddressPool", "protocol", "frontendPort"],
};

pub const INBOUND_NAT_RULE: Shape = Shape {
    schema: "InboundNatRule",
    what: "inbound NAT rule",
    fields: &[
        "name",
        "frontendIPConfiguration",
        "protocol",
        "frontendPort",
        "frontendPortRangeStart",
        "frontendPortRangeEnd",
        "backendPort",
        "backendIPConfiguration",
        "backendAddressPool",
        "idleTimeoutInMinutes",
        "enableTcpReset",
        "enableFloatingIP",
    ],
    required: &["name", "frontendIPConfiguration", "protocol", "backendPort"],
};

pub const UPLINK: Shape = Shape {
    schema: "Uplink",
    what: "uplink",
    fields: &["device", "hook", "reserveHostPorts"],
    required: &["device"],
};

pub const HOST_ACCESS: Shape = Shape {
    schema: "HostAccess",
    what: "host access",
    fields: &["dhcp", "dns", "echo", "services"],
    required: &[],
};

pub const HOST_SERVICE: Shape = Shape {
    schema: "HostService",
    what: "host service",
    fields: &["protocol", "portRange"],
    required: &["protocol", "portRange"],
};

pub const TIMEOUTS: Shape = Shape {
    schema: "Timeouts",
    what: "timeouts",
    fields: &[
        "tcpEstablishedSeconds",
        "tcpHalfOpenSeconds",
        "tcpFinSeconds",
        "tcpResetSeconds",
        "tcpTransitorySeconds",
        "udpSeconds",
        "icmpSeconds",
        "otherSeconds",
    ],
    required: &[],
};

pub const FLOW_TABLE: Shape = Shape {
    schema: "FlowTable",
    what: "flow table",
    fields: &["maxFlows", "maxFlowsIPv6", "maxFlowsPerGuest", "maxFlowsPerGuestIPv6"],
    required: &[],
};

pub const ADOPTION: Shape =
    Shape { schema: "Adoption", what: "adoption", fields: &["graceSeconds"], required: &[] };

/// All shapes, for the test that compares them with the JSON Schema.
#[cfg(test)]
pub const ALL: &[&Shape] = &[
    &POLICY,
    &VIRTUAL_NETWORK,
    &PEERING,
    &ADDRESS_SPACE,
    &SUBNET,
    &NETWORK_INTERFACE,
    &IP_CONFIGURATION,
    &SECURITY_GROUP,
    &SECURITY_RULE,
    &APPLICATION_SECURITY_GROUP,
    &SERVICE_TAGS,
    &SERVICE_TAG,
    &ROUTE_TABLE,
    &ROUTE,
    &PLATFORM_RULES,
    &PLATFORM_SERVICE,
    &LIMITS,
    &PUBLIC_ADDRESS,
    &PUBLIC_PREFIX,
    &DEFAULT_OUTBOUND,
    &SNAT,
    &LOAD_BALANCER,
    &FRONTEND,
    &BACKEND_POOL,
    &OUTBOUND_RULE,
    &PROBE,
    &LOAD_BALANCING_RULE,
    &INBOUND_NAT_RULE,
    &UPLINK,
    &HOST_ACCESS,
    &HOST_SERVICE,
    &TIMEOUTS,
    &FLOW_TABLE,
    &ADOPTION,
];

/// Fields that Azure has and Portcullis does not yet, or does not have; the reader says so instead of "unknown".
pub const NOT_AVAILABLE: &[(&str, &str)] = &[
    (
        "inboundNatPools",
        "write an inbound NAT rule with `frontendPortRangeStart`, `frontendPortRangeEnd` and `backendAddressPool`",
    ),
    ("natGateway", "NAT gateways are not available yet"),
    (
        "flushConnection",
        "it is one setting for the whole policy here: write `onRuleChange: reevaluate` at the top",
    ),
    ("defaultSecurityRules", "the default rules are built in: override them with rules of your own"),
    ("properties", "Azure's nested `properties` does not exist here: move its fields one level up"),
];
