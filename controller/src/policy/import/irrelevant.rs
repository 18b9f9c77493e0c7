//! What to think of a property that no reader asked for. There is no third way: what is not in these tables is reported.

use super::json::Json;
use super::report::Level;

/// What becomes of it.
pub enum Verdict {
    /// Nothing is lost; the reason.
    Ignore(&'static str),
    /// It is told: how grave, why, what to do.
    Report(Level, String, String),
}

/// Properties whose value does not matter here, and why: (kinds of object, property, reason). `any` is all of them.
const IRRELEVANT: &[(&str, &str, &str)] = &[
    ("any", "etag", "version stamp of Azure's database"),
    ("any", "id", "identity in Azure; references are resolved by it"),
    ("any", "type", "says of which kind the resource is, which decided how it was read"),
    ("any", "kind", "variant of the resource in Azure's portal"),
    ("any", "location", "where in Azure it ran"),
    ("any", "extendedLocation", "where in Azure it ran"),
    ("any", "zones", "where in Azure it ran"),
    ("any", "tags", "labels for people and bills; no packet sees them"),
    ("any", "sku", "Azure's price list; there is one grade of everything here"),
    ("any", "provisioningState", "whether Azure was done with its last change"),
    ("any", "resourceGuid", "identity in Azure's database"),
    ("any", "resourceGroup", "administrative folder in Azure"),
    ("any", "subscriptionId", "administrative folder in Azure"),
    ("any", "systemData", "who changed it when in Azure"),
    ("any", "managedBy", "who manages it in Azure"),
    ("any", "apiVersion", "how to talk to Azure's REST interface"),
    ("any", "dependsOn", "order of deployment in Azure"),
    ("any", "comments", "comment of a template"),
    ("any", "comment", "comment of a template"),
    ("any", "metadata", "comment of a template"),
    ("any", "scale", "comment of a template"),
    ("any", "source", "note of whoever collected the file: where it comes from"),
    ("any", "complete", "note of whoever collected the file"),
    ("group", "subnets", "the subnets that use the group say so themselves"),
    ("group", "networkInterfaces", "the interfaces that use the group say so themselves"),
    ("group", "flowLogs", "logging is not part of the policy"),
    ("asg", "ipConfigurations", "members name the group themselves"),
    ("network", "enableVmProtection", "guard of Azure's portal against deletion"),
    ("network", "bgpCommunities", "routing between Azure and a private line"),
    ("network", "privateEndpointVNetPolicies", "concerns Azure's private endpoints only"),
    ("subnet", "ipConfigurations", "the interfaces in the subnet say so themselves"),
    ("subnet", "ipConfigurationProfiles", "the interfaces in the subnet say so themselves"),
    ("subnet", "purpose", "what Azure uses the subnet for"),
    ("subnet", "privateEndpointNetworkPolicies", "concerns Azure's private endpoints only"),
    ("subnet", "privateLinkServiceNetworkPolicies", "concerns Azure's private links only"),
    ("subnet", "privateEndpoints", "concerns Azure's private endpoints only"),
    ("subnet", "resourceNavigationLinks", "says which Azure service uses the subnet"),
    ("subnet", "serviceAssociationLinks", "says which Azure service uses the subnet"),
    ("routeTable", "subnets", "the subnets that use the table say so themselves"),
    ("routeTable", "disableBgpRoutePropagation", "there is no BGP here whose routes could be kept out"),
    ("route", "hasBgpOverride", "there is no BGP here"),
    ("peering", "allowVirtualNetworkAccess", "allowed, which is what a peering does here"),
    ("peering", "peeringState", "connected"),
    ("peering", "peeringSyncLevel", "how far Azure is with a change of address space"),
    ("peering", "remoteAddressSpace", "the other network says so itself"),
    ("peering", "remoteVirtualNetworkAddressSpace", "the other network says so itself"),
    ("peering", "remoteVirtualNetworkEncryption", "the other network says so itself"),
    ("peering", "remoteBgpCommunities", "routing between Azure and a private line"),
    ("peering", "doNotVerifyRemoteGateways", "concerns Azure's gateways only"),
    ("peering", "peerCompleteVnets", "whole networks are peered here"),
    ("interface", "virtualMachine", "which machine uses it; here the device says so"),
    ("interface", "virtualMachineScaleSet", "which machine uses it; here the device says so"),
    ("interface", "primary", "which interface the guest uses first is the guest's business"),
    ("interface", "enableAcceleratedNetworking", "how Azure's host carries packets; see `hook`"),
    ("interface", "vnetEncryptionSupported", "how Azure's host carries packets"),
    ("interface", "hostedWorkloads", "which machine uses it"),
    ("interface", "nicType", "how Azure made it"),
    ("interface", "auxiliaryMode", "how Azure's host carries packets"),
    ("interface", "auxiliarySku", "how Azure's host carries packets"),
    ("interface", "disableTcpStateTracking", "how Azure's host carries packets"),
    ("interface", "defaultOutboundConnectivityEnabled", "there is no default outbound here unless asked for"),
    ("ipConfiguration", "primary", "which address the guest uses first is the guest's business"),
    ("ipConfiguration", "privateIPAllocationMethod", "every address is written down here"),
    ("ipConfiguration", "privateIPAddressVersion", "the address shows it"),
    ("public", "ipConfiguration", "whoever uses the address says so itself"),
    ("public", "publicIPAllocationMethod", "every address is written down here"),
    ("public", "ipTags", "which of Azure's ranges the address is from"),
    ("public", "migrationPhase", "Azure's move between grades of addresses"),
    ("public", "deleteOption", "what Azure does when the machine goes"),
    ("public", "publicIPPrefix", "the address is written down here"),
    ("prefix", "publicIPAddresses", "the addresses name the prefix themselves"),
    ("prefix", "publicIPAddressVersion", "the prefix shows it"),
    ("prefix", "prefixLength", "the prefix shows it"),
    ("prefix", "ipTags", "which of Azure's ranges the prefix is from"),
    ("prefix", "loadBalancerFrontendIPConfiguration", "the frontend that uses the prefix says so itself"),
    ("frontend", "privateIPAddress", "only for addresses inside a subnet"),
    ("frontend", "privateIPAllocationMethod", "only for addresses inside a subnet"),
    ("frontend", "loadBalancingRules", "the rules name the frontend themselves"),
    ("frontend", "inboundNatRules", "the rules name the frontend themselves"),
    ("frontend", "inboundNatPools", "the pools name the frontend themselves"),
    ("frontend", "outboundRules", "the rules name the frontend themselves"),
    ("pool", "loadBalancingRules", "the rules name the pool themselves"),
    ("pool", "inboundNatRules", "the rules name the pool themselves"),
    ("pool", "outboundRule", "the rule names the pool itself"),
    ("pool", "outboundRules", "the rules name the pool themselves"),
    ("probe", "loadBalancingRules", "the rules name the probe themselves"),
    ("tagList", "changeNumber", "version of Azure's list"),
    ("tagList", "cloud", "which of Azure's clouds the list is of"),
    ("tagList", "name", "name of the list"),
    ("tag", "changeNumber", "version of Azure's list"),
    ("tag", "region", "part of the tag's name"),
    ("tag", "regionId", "part of the tag's name"),
    ("tag", "platform", "Azure"),
    ("tag", "systemService", "part of the tag's name"),
    ("tag", "networkFeatures", "which of Azure's services take the tag"),
    ("tag", "serviceTagChangeNumber", "version of Azure's list"),
    ("template", "$schema", "says that this is a template"),
    ("template", "contentVersion", "version of the template"),
    ("template", "languageVersion", "version of the template language"),
    ("template", "apiProfile", "how to talk to Azure's REST interface"),
    (
        "template",
        "parameters",
        "declared for the deployment; where a value depends on one, that value is reported",
    ),
    (
        "template",
        "variables",
        "for use in the template; where a value depends on one, that value is reported",
    ),
    (
        "template",
        "functions",
        "for use in the template; where a value depends on one, that value is reported",
    ),
    ("template", "outputs", "what the deployment answers"),
    ("example", "parameters", "the request; what was answered counts"),
    ("example", "title", "title of the example"),
    ("example", "operationId", "which request it is an example of"),
    ("example", "headers", "of the answer"),
    ("deployment", "name", "name of the deployment"),
    ("deployment", "mode", "how to deploy"),
    (
        "deployment",
        "parameters",
        "values for the deployment; where a value depends on one, that value is reported",
    ),
    ("quickstart", "resource_raw", "the same resource before its expressions were resolved"),
];

/// Properties that ask for something Portcullis does not do; of no consequence when false or empty:
/// (kind, property, grave, why, what to do).
const NOT_HERE: &[(&str, &str, Level, &str, &str)] = &[
    (
        "any",
        "condition",
        Level::Warning,
        "deployed only if the condition holds",
        "remove it from the policy if it does not",
    ),
    (
        "any",
        "copy",
        Level::Warning,
        "a loop of the template, carried over once",
        "repeat it in the policy as often as needed",
    ),
    ("any", "nextLink", Level::Warning, "the list goes on in another answer", "import the other pages too"),
    (
        "network",
        "dhcpOptions",
        Level::Warning,
        "Portcullis brings no DHCP server",
        "set the resolvers in this host's DHCP server",
    ),
    (
        "network",
        "enableDdosProtection",
        Level::Warning,
        "there is no such protection here",
        "nothing can be done about it",
    ),
    (
        "network",
        "ddosProtectionPlan",
        Level::Warning,
        "there is no such protection here",
        "nothing can be done about it",
    ),
    (
        "network",
        "encryption",
        Level::Warning,
        "traffic between guests is not encrypted here",
        "use a VPN between hosts",
    ),
    ("network", "flowTimeoutInMinutes", Level::Warning, "timeouts are those of the policy", "set `timeouts`"),
    (
        "network",
        "ipAllocations",
        Level::Warning,
        "Azure's address management",
        "nothing can be done about it",
    ),
    (
        "subnet",
        "serviceEndpoints",
        Level::Warning,
        "Azure's services are reached like the rest of the internet",
        "nothing can be done about it",
    ),
    (
        "subnet",
        "serviceEndpointPolicies",
        Level::Error,
        "Azure's services are reached like the rest of the internet, \
        whatever such a policy forbade",
        "add Deny rules to the subnet's group",
    ),
    (
        "subnet",
        "natGateway",
        Level::Warning,
        "NAT gateways are not available yet",
        "use a load balancer with an outbound rule",
    ),
    (
        "subnet",
        "delegations",
        Level::Warning,
        "Azure's services cannot live in a subnet here",
        "nothing can be done about it",
    ),
    ("subnet", "ipAllocations", Level::Warning, "Azure's address management", "nothing can be done about it"),
    (
        "subnet",
        "applicationGatewayIPConfigurations",
        Level::Warning,
        "there are no application gateways here",
        "nothing can be done about it",
    ),
    (
        "interface",
        "dnsSettings",
        Level::Warning,
        "Portcullis brings no DHCP server",
        "set the resolvers in this host's DHCP server",
    ),
    (
        "interface",
        "enableIPForwarding",
        Level::Warning,
        "a guest may send from its own addresses only",
        "give the guest the \
        addresses it forwards for, or connect what is behind it directly",
    ),
    (
        "interface",
        "dscpConfiguration",
        Level::Warning,
        "packets are not marked here",
        "nothing can be done about it",
    ),
    (
        "interface",
        "tapConfigurations",
        Level::Warning,
        "traffic is not mirrored here",
        "nothing can be done about it",
    ),
    (
        "interface",
        "privateEndpoint",
        Level::Warning,
        "there are no private endpoints here",
        "nothing can be done about it",
    ),
    (
        "interface",
        "privateLinkService",
        Level::Warning,
        "there are no private links here",
        "nothing can be done about it",
    ),
    (
        "ipConfiguration",
        "applicationGatewayBackendAddressPools",
        Level::Warning,
        "there are no application gateways here",
        "nothing can be done about it",
    ),
    (
        "ipConfiguration",
        "virtualNetworkTaps",
        Level::Warning,
        "traffic is not mirrored here",
        "nothing can be done about it",
    ),
    (
        "ipConfiguration",
        "gatewayLoadBalancer",
        Level::Warning,
        "there are no gateway load balancers here",
        "nothing can be done about it",
    ),
    (
        "ipConfiguration",
        "privateLinkConnectionProperties",
        Level::Warning,
        "there are no private links here",
        "nothing can be done about it",
    ),
    (
        "peering",
        "allowForwardedTraffic",
        Level::Warning,
        "forwarded traffic does not pass a peering here",
        "nothing can be done about it",
    ),
    (
        "peering",
        "allowGatewayTransit",
        Level::Warning,
        "there are no gateways between networks here",
        "nothing can be done about it",
    ),
    (
        "peering",
        "useRemoteGateways",
        Level::Warning,
        "there are no gateways between networks here",
        "nothing can be done about it",
    ),
    (
        "public",
        "dnsSettings",
        Level::Warning,
        "Portcullis keeps no names",
        "publish the name in your own DNS",
    ),
    (
        "public",
        "ddosSettings",
        Level::Warning,
        "there is no such protection here",
        "nothing can be done about it",
    ),
    (
        "public",
        "natGateway",
        Level::Warning,
        "NAT gateways are not available yet",
        "use a load balancer with an outbound rule",
    ),
    (
        "public",
        "linkedPublicIPAddress",
        Level::Warning,
        "Azure's move between grades of addresses",
        "nothing can be done about it",
    ),
    (
        "public",
        "servicePublicIPAddress",
        Level::Warning,
        "Azure's move between grades of addresses",
        "nothing can be done about it",
    ),
    (
        "prefix",
        "natGateway",
        Level::Warning,
        "NAT gateways are not available yet",
        "use a load balancer with an outbound rule",
    ),
    ("prefix", "customIPPrefix", Level::Warning, "your own range at Azure", "announce the range yourself"),
    (
        "frontend",
        "gatewayLoadBalancer",
        Level::Warning,
        "there are no gateway load balancers here",
        "nothing can be done about it",
    ),
    (
        "balancingRule",
        "enableConnectionTracking",
        Level::Warning,
        "there are no gateway load balancers here",
        "nothing can be done about it",
    ),
    (
        "pool",
        "tunnelInterfaces",
        Level::Warning,
        "there are no gateway load balancers here",
        "nothing can be done about it",
    ),
    (
        "pool",
        "drainPeriodInSeconds",
        Level::Warning,
        "members leave a pool at once",
        "nothing can be done about it",
    ),
    (
        "pool",
        "loadBalancerBackendAddresses",
        Level::Warning,
        "members are named by interface here, not by address",
        "list the interfaces in `backendIPConfigurations`",
    ),
];

/// Looks a property up; the more special table counts.
pub fn verdict(kinds: &[&str], key: &str, json: &Json) -> Verdict {
    if json.is_empty() {
        return Verdict::Ignore("empty");
    }
    let hit =
        |kind: &str, name: &str| (kind == "any" || kinds.contains(&kind)) && name.eq_ignore_ascii_case(key);
    if let Some((_, _, level, why, action)) = NOT_HERE.iter().find(|(kind, name, ..)| hit(kind, name)) {
        return match asks_for_nothing(json) {
            true => Verdict::Ignore("not in use"),
            false => Verdict::Report(*level, (*why).to_owned(), (*action).to_owned()),
        };
    }
    if let Some((_, _, why)) = IRRELEVANT.iter().find(|(kind, name, _)| hit(kind, name)) {
        return Verdict::Ignore(why);
    }
    if key.starts_with('_') {
        return Verdict::Ignore("note of whoever collected the file");
    }
    Verdict::Report(
        Level::Warning,
        "Portcullis does not know this property".to_owned(),
        "see whether it matters; if it does, say it in the policy by hand".to_owned(),
    )
}

/// False, or an object whose only contents are empty, false, or what Azure filled in itself.
fn asks_for_nothing(json: &Json) -> bool {
    match json {
        Json::Bool(false) => true,
        Json::Text(text) => text.eq_ignore_ascii_case("false"),
        Json::List(items) => items.iter().all(Json::is_empty),
        Json::Map(entries) => entries.iter().all(|(key, value)| {
            ["internalDomainNameSuffix", "internalFqdn"].iter().any(|own| key.eq_ignore_ascii_case(own))
                || value.is_empty()
                || *value == Json::Bool(false)
        }),
        _ => json.is_empty(),
    }
}
