//! Who may talk to whom (`security.istio.io`).

use std::collections::BTreeMap;
use std::time::Duration;

use super::traffic::{PolicyTargetReference, WorkloadSelector};
use crate::config::decode::{enumeration, message};

message! {
    /// Which requests are allowed.
    pub struct AuthorizationPolicy {
        /// Workloads; none is every workload in scope.
        selector: Option<WorkloadSelector> = "selector";
        /// The object it is attached to instead.
        target_ref: Option<PolicyTargetReference> = "targetRef" ~ "use targetRefs";
        /// The objects it is attached to instead.
        target_refs: Vec<PolicyTargetReference> = "targetRefs";
        /// The rules, any of which matches; none never matches.
        rules: Vec<Rule> = "rules";
        /// What a match means.
        action: AuthorizationAction = "action";
        /// Who decides, for `CUSTOM`.
        provider: Option<ExtensionProviderName> = "provider";
    }

    /// An extension provider of the mesh configuration.
    pub struct ExtensionProviderName {
        /// Its name.
        name: String = "name";
    }

    /// A rule: some source, some operation and every condition must match.
    pub struct Rule {
        /// Any of these sources; none is any source.
        from: Vec<RuleFrom> = "from";
        /// Any of these operations; none is any operation.
        to: Vec<RuleTo> = "to";
        /// All of these conditions.
        when: Vec<Condition> = "when";
    }

    /// A source.
    pub struct RuleFrom {
        /// Who asks.
        source: Option<Source> = "source";
    }

    /// An operation.
    pub struct RuleTo {
        /// What is asked for.
        operation: Option<Operation> = "operation";
    }

    /// Who asks: every field that is set must match.
    pub struct Source {
        /// Identities without `spiffe://`; `*` at one end is a wildcard.
        principals: Vec<String> = "principals";
        /// None of these identities.
        not_principals: Vec<String> = "notPrincipals";
        /// `issuer/subject` of the request's token.
        request_principals: Vec<String> = "requestPrincipals";
        /// None of these.
        not_request_principals: Vec<String> = "notRequestPrincipals";
        /// Namespaces of the identity.
        namespaces: Vec<String> = "namespaces";
        /// None of these namespaces.
        not_namespaces: Vec<String> = "notNamespaces";
        /// Service accounts, `name` or `namespace/name`.
        service_accounts: Vec<String> = "serviceAccounts";
        /// None of these service accounts.
        not_service_accounts: Vec<String> = "notServiceAccounts";
        /// Trust domains of the identity.
        trust_domains: Vec<String> = "trustDomains";
        /// None of these trust domains.
        not_trust_domains: Vec<String> = "notTrustDomains";
        /// Addresses or ranges of the connection.
        ip_blocks: Vec<String> = "ipBlocks";
        /// None of these.
        not_ip_blocks: Vec<String> = "notIpBlocks";
        /// Addresses or ranges of the client, after trusted proxies.
        remote_ip_blocks: Vec<String> = "remoteIpBlocks";
        /// None of these.
        not_remote_ip_blocks: Vec<String> = "notRemoteIpBlocks";
    }

    /// What is asked for: every field that is set must match.
    pub struct Operation {
        /// Hosts, without regard to case.
        hosts: Vec<String> = "hosts";
        /// None of these hosts.
        not_hosts: Vec<String> = "notHosts";
        /// Ports of the workload.
        ports: Vec<String> = "ports";
        /// None of these ports.
        not_ports: Vec<String> = "notPorts";
        /// Methods.
        methods: Vec<String> = "methods";
        /// None of these methods.
        not_methods: Vec<String> = "notMethods";
        /// Paths; `*` at one end, or `{*}` and `{**}` within.
        paths: Vec<String> = "paths";
        /// None of these paths.
        not_paths: Vec<String> = "notPaths";
    }

    /// A further condition.
    pub struct Condition {
        /// What is looked at, for example `request.headers[x-token]`.
        key: String = "key";
        /// Any of these values.
        values: Vec<String> = "values";
        /// None of these values.
        not_values: Vec<String> = "notValues";
    }

    /// Which connections are accepted.
    pub struct PeerAuthentication {
        /// Workloads; none is every workload in scope.
        selector: Option<WorkloadSelector> = "selector";
        /// For every port.
        mtls: Option<MutualTls> = "mtls";
        /// For single ports of the workload.
        port_level_mtls: BTreeMap<u16, MutualTls> = "portLevelMtls";
    }

    /// How strict mutual TLS is.
    pub struct MutualTls {
        /// The mode.
        mode: MutualTlsMode = "mode";
    }

    /// Which tokens are valid.
    pub struct RequestAuthentication {
        /// Workloads; none is every workload in scope.
        selector: Option<WorkloadSelector> = "selector";
        /// The object it is attached to instead.
        target_ref: Option<PolicyTargetReference> = "targetRef" ~ "use targetRefs";
        /// The objects it is attached to instead.
        target_refs: Vec<PolicyTargetReference> = "targetRefs";
        /// Issuers and their keys.
        jwt_rules: Vec<JwtRule> = "jwtRules";
    }

    /// An issuer of tokens.
    pub struct JwtRule {
        /// The token's `iss`.
        issuer: String = "issuer";
        /// Accepted `aud`; none takes any.
        audiences: Vec<String> = "audiences";
        /// Where the keys are.
        jwks_uri: String = "jwksUri" | "jwks_uri";
        /// The keys.
        jwks: String = "jwks";
        /// Headers to look for the token.
        from_headers: Vec<JwtHeader> = "fromHeaders";
        /// Parameters of the query to look for the token.
        from_params: Vec<String> = "fromParams";
        /// Cookies to look for the token.
        from_cookies: Vec<String> = "fromCookies";
        /// Header that gets the token's payload.
        output_payload_to_header: String = "outputPayloadToHeader";
        /// Leave the token in the request.
        forward_original_token: bool = "forwardOriginalToken";
        /// Headers that get single claims.
        output_claim_to_headers: Vec<ClaimToHeader> = "outputClaimToHeaders";
        /// Time to fetch keys; absent is 5 s.
        timeout: Option<Duration> = "timeout";
        /// Claims that are lists separated by spaces, besides `scope` and `permission`.
        space_delimited_claims: Vec<String> = "spaceDelimitedClaims";
    }

    /// A header that may hold the token.
    pub struct JwtHeader {
        /// Name.
        name: String = "name";
        /// What precedes the token, for example `Bearer `.
        prefix: String = "prefix";
    }

    /// A claim that becomes a header.
    pub struct ClaimToHeader {
        /// The header.
        header: String = "header";
        /// The claim; `.` goes into nested claims.
        claim: String = "claim";
    }
}

enumeration! {
    /// What a match of a policy means.
    pub enum AuthorizationAction {
        /// Allowed, and everything that no such policy matches is denied.
        Allow = "ALLOW",
        /// Denied.
        Deny = "DENY",
        /// Logged.
        Audit = "AUDIT",
        /// An extension provider decides.
        Custom = "CUSTOM",
    }

    /// How strict mutual TLS is.
    pub enum MutualTlsMode {
        /// As the wider scope says; `PERMISSIVE` at the top.
        Unset = "UNSET",
        /// Plain text only.
        Disable = "DISABLE",
        /// Plain text and mutual TLS.
        Permissive = "PERMISSIVE",
        /// Mutual TLS only.
        Strict = "STRICT",
    }
}
