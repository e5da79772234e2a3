//! What happens to the requests of a route.

use std::sync::Arc;
use std::time::Duration;

use envoy_types::pb::envoy::config::route::v3 as pb;
use http::uri::Scheme;
use http::{HeaderName, HeaderValue, StatusCode};

use super::retry::RetryPolicy;
use super::{Above, ClusterNames, ClusterRef};
use crate::xds::decode::{
    Fraction, Invalid, Under as _, data_source, header_name, header_value, opt_duration, runtime_fraction,
    timeout, u32_or,
};
use crate::xds::filter::{FilterOverride, PerFilter, per_filter, route_cors, status};
use crate::xds::matcher::{HeaderKey, RegexRewrite};
use crate::xds::mutation::HeaderOps;

/// How long a request may take unless its route says otherwise (Envoy's default).
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(15);

/// What happens.
#[derive(Debug)]
pub enum Action {
    /// It is sent to a cluster.
    Forward(Box<Forward>),
    /// The client is sent elsewhere.
    Redirect(Box<Redirect>),
    /// The proxy answers.
    Direct(Box<DirectResponse>),
    /// The route only carries settings for filters; a request that comes this far finds no route.
    NonForwarding,
}

/// Sending a request on.
#[derive(Debug)]
pub struct Forward {
    /// Where.
    pub cluster: ClusterChoice,
    /// The answer when that cluster does not exist.
    pub cluster_not_found: StatusCode,
    /// How long the whole exchange may take; `None`: for ever.
    pub timeout: Option<Duration>,
    /// How long nothing may move; `None`: as the connection manager says. Zero: for ever.
    pub idle_timeout: Option<Duration>,
    /// The longest timeout that a `grpc-timeout` header may ask for, and what is taken off it.
    pub grpc_timeout: Option<GrpcTimeout>,
    /// When it is tried again.
    pub retry: Option<Arc<RetryPolicy>>,
    /// The path that is sent on.
    pub path_rewrite: PathRewrite,
    /// The authority that is sent on.
    pub host_rewrite: HostRewrite,
    /// Put the old authority into `x-forwarded-host`.
    pub append_x_forwarded_host: bool,
    /// Copies that go elsewhere.
    pub mirrors: Box<[MirrorPolicy]>,
    /// What a hash balancer hashes.
    pub hash: Box<[HashPolicy]>,
}

/// A bound on the timeout a gRPC client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GrpcTimeout {
    /// At most this; `None`: whatever it asks for.
    pub max: Option<Duration>,
    /// Taken off, so that this proxy's answer comes before the client gives up.
    pub offset: Duration,
}

/// Which cluster.
#[derive(Debug)]
pub enum ClusterChoice {
    /// This one.
    One(ClusterRef),
    /// One of these, by weight.
    Weighted(Weighted),
    /// The one this request header names.
    Header(HeaderName),
}

/// Clusters by weight.
#[derive(Debug)]
pub struct Weighted {
    /// In configuration's order; each entry's `until` is the sum of the weights so far.
    pub clusters: Box<[WeightedCluster]>,
    /// The sum of all weights, more than 0.
    pub total: u64,
}

/// One of them.
#[derive(Debug)]
pub struct WeightedCluster {
    /// Which.
    pub cluster: ClusterRef,
    /// A random number below this, and not below the one before, picks it.
    pub until: u64,
    /// Operations on requests, at this level.
    pub request_headers: HeaderOps,
    /// Operations on responses, at this level.
    pub response_headers: HeaderOps,
    /// What this level and those above say about filters.
    pub per_filter: Arc<PerFilter>,
    /// The authority that is sent on.
    pub host_rewrite: Option<HeaderValue>,
}

impl Weighted {
    /// The cluster for a random number.
    #[must_use]
    pub fn pick(&self, random: u64) -> Option<&WeightedCluster> {
        let at = random % self.total.max(1);
        self.clusters.iter().find(|c| at < c.until)
    }
}

/// The path that is sent on.
#[derive(Debug, Clone)]
pub enum PathRewrite {
    /// As it came.
    None,
    /// The part that the route matched (prefix or whole path) is replaced.
    Prefix(Box<str>),
    /// Every match is replaced.
    Regex(RegexRewrite),
    /// The whole path is replaced; the query stays.
    Full(Box<str>),
}

/// The authority that is sent on.
#[derive(Debug, Clone)]
pub enum HostRewrite {
    /// As it came.
    None,
    /// This.
    Literal(HeaderValue),
    /// The name of the endpoint that was picked.
    Auto,
    /// The value of this request header.
    Header(HeaderName),
    /// Made from the path.
    PathRegex(RegexRewrite),
}

/// A copy that goes elsewhere; its answer is not waited for.
#[derive(Debug, Clone)]
pub struct MirrorPolicy {
    /// Where.
    pub cluster: ClusterRef,
    /// Which share of requests.
    pub fraction: Fraction,
    /// Leave the authority without `-shadow`.
    pub keep_host: bool,
    /// The authority of the copy.
    pub host_rewrite: Option<HeaderValue>,
}

/// Something to hash.
#[derive(Debug, Clone)]
pub struct HashPolicy {
    /// What.
    pub on: HashOn,
    /// If this yields something, later policies are not asked.
    pub terminal: bool,
}

/// What is hashed.
#[derive(Debug, Clone)]
pub enum HashOn {
    /// A header, rewritten first.
    Header(HeaderKey, Option<RegexRewrite>),
    /// A cookie, which is made when it is missing and a lifetime is set.
    Cookie {
        /// Its name.
        name: Box<str>,
        /// Its path.
        path: Option<Box<str>>,
        /// Its lifetime; zero: a session cookie.
        ttl: Option<Duration>,
        /// Further attributes, as they are written: `; SameSite=Strict; Secure`.
        attributes: Box<str>,
    },
    /// The client's address.
    SourceIp,
    /// A query parameter.
    Query(Box<str>),
}

/// Sending the client elsewhere.
#[derive(Debug, Clone)]
pub struct Redirect {
    /// 301, 302, 303, 307 or 308.
    pub status: StatusCode,
    /// Another scheme.
    pub scheme: Option<Scheme>,
    /// Another host.
    pub host: Option<Box<str>>,
    /// Another port.
    pub port: Option<u16>,
    /// Another path.
    pub path: PathRewrite,
    /// Leave the query out.
    pub strip_query: bool,
}

/// Answering in place of a server.
#[derive(Debug, Clone)]
pub struct DirectResponse {
    /// The status.
    pub status: StatusCode,
    /// The body, if any.
    pub body: bytes::Bytes,
}

impl Action {
    pub(super) fn new(
        pb: Option<pb::route::Action>,
        above: &Above,
        level: &mut Arc<PerFilter>,
        clusters: &mut ClusterNames,
    ) -> Result<Self, Invalid> {
        use pb::route::Action as Pb;
        match pb {
            None => Err(Invalid::missing("action")),
            Some(Pb::Route(mut r)) => {
                #[expect(deprecated, reason = "older servers still send it")]
                let cors = r.cors.take().or_else(|| above.cors.clone());
                if let Some(cors) = cors {
                    let policy = Arc::new(route_cors(cors).under("route.cors")?);
                    let name = Arc::from("envoy.filters.http.cors");
                    Arc::make_mut(level).entry(name).or_insert(FilterOverride::Cors(policy));
                }
                forward(r, above, level, clusters).under("route").map(|f| Self::Forward(Box::new(f)))
            }
            Some(Pb::Redirect(r)) => redirect(r).under("redirect").map(|r| Self::Redirect(Box::new(r))),
            Some(Pb::DirectResponse(d)) => {
                direct(d).under("direct_response").map(|d| Self::Direct(Box::new(d)))
            }
            Some(Pb::NonForwardingAction(_)) => Ok(Self::NonForwarding),
            Some(Pb::FilterAction(_)) => Err(Invalid::unsupported("filter_action")),
        }
    }
}

fn refuse_unsupported(pb: &pb::RouteAction) -> Result<(), Invalid> {
    #[expect(deprecated, reason = "refused")]
    let redirects = pb.internal_redirect_action != 0;
    for (set, field) in [
        // Subsets by metadata: Istio makes a cluster for each subset instead.
        (pb.metadata_match.is_some(), "metadata_match"),
        (pb.path_rewrite_policy.is_some(), "path_rewrite_policy"),
        (pb.early_data_policy.is_some(), "early_data_policy"),
        (pb.retry_policy_typed_config.is_some(), "retry_policy_typed_config"),
        (!pb.rate_limits.is_empty(), "rate_limits"),
        (pb.internal_redirect_policy.is_some() || redirects, "internal_redirect_policy"),
        (pb.hedge_policy.is_some(), "hedge_policy"),
        (pb.priority != 0, "priority"),
        (!pb.upgrade_configs.is_empty(), "upgrade_configs"),
    ] {
        if set {
            return Err(Invalid::unsupported(field));
        }
    }
    Ok(())
}

fn forward(
    pb: pb::RouteAction,
    above: &Above,
    level: &Arc<PerFilter>,
    clusters: &mut ClusterNames,
) -> Result<Forward, Invalid> {
    refuse_unsupported(&pb)?;
    let cluster_not_found = match pb.cluster_not_found_response_code {
        0 => StatusCode::SERVICE_UNAVAILABLE,
        1 => StatusCode::NOT_FOUND,
        2 => StatusCode::INTERNAL_SERVER_ERROR,
        other => {
            return Err(Invalid::new("cluster_not_found_response_code", format!("unknown value {other}")));
        }
    };
    let grpc_timeout = grpc_timeout(&pb)?;
    let path_rewrite = path_rewrite(pb.prefix_rewrite, pb.regex_rewrite, pb.path_rewrite)?;
    let own_mirrors = mirrors(pb.request_mirror_policies, clusters)?;
    let retry = match pb.retry_policy {
        Some(r) => Some(Arc::new(RetryPolicy::new(r).under("retry_policy")?)),
        None => above.retry.clone(),
    };
    let hash = pb
        .hash_policy
        .into_iter()
        .enumerate()
        .map(|(i, h)| hash_policy(h).at("hash_policy", i))
        .collect::<Result<_, _>>()?;
    Ok(Forward {
        cluster: cluster_choice(pb.cluster_specifier, level, clusters)?,
        cluster_not_found,
        timeout: timeout(pb.timeout, Some(DEFAULT_TIMEOUT), "timeout")?,
        idle_timeout: opt_duration(pb.idle_timeout, "idle_timeout")?,
        grpc_timeout,
        retry,
        path_rewrite,
        host_rewrite: host_rewrite(pb.host_rewrite_specifier)?,
        append_x_forwarded_host: pb.append_x_forwarded_host,
        mirrors: if own_mirrors.is_empty() { above.mirrors.clone() } else { own_mirrors },
        hash,
    })
}

fn grpc_timeout(pb: &pb::RouteAction) -> Result<Option<GrpcTimeout>, Invalid> {
    #[expect(deprecated, reason = "older servers still send them")]
    let (old_max, old_offset) = (pb.max_grpc_timeout, pb.grpc_timeout_offset);
    let mut grpc = None;
    if let Some(max) = old_max {
        let max = timeout(Some(max), None, "max_grpc_timeout")?;
        grpc = Some(GrpcTimeout {
            max,
            offset: opt_duration(old_offset, "grpc_timeout_offset")?.unwrap_or_default(),
        });
    }
    if let Some(d) = &pb.max_stream_duration {
        let field = "max_stream_duration";
        if timeout(d.max_stream_duration, None, "max_stream_duration").under(field)?.is_some() {
            return Err(Invalid::unsupported("max_stream_duration.max_stream_duration"));
        }
        if let Some(max) = d.grpc_timeout_header_max {
            let max = timeout(Some(max), None, "grpc_timeout_header_max").under(field)?;
            let offset =
                opt_duration(d.grpc_timeout_header_offset, "grpc_timeout_header_offset").under(field)?;
            grpc = Some(GrpcTimeout { max, offset: offset.unwrap_or_default() });
        }
    }
    Ok(grpc)
}

fn path_rewrite(
    prefix: String,
    regex: Option<envoy_types::pb::envoy::r#type::matcher::v3::RegexMatchAndSubstitute>,
    full: String,
) -> Result<PathRewrite, Invalid> {
    match (prefix.is_empty(), regex, full.is_empty()) {
        (true, None, true) => Ok(PathRewrite::None),
        (false, None, true) => Ok(PathRewrite::Prefix(prefix.into())),
        (true, Some(r), true) => RegexRewrite::new(r).under("regex_rewrite").map(PathRewrite::Regex),
        (true, None, false) => Ok(PathRewrite::Full(full.into())),
        _ => Err(Invalid::new(
            "prefix_rewrite",
            "only one of prefix_rewrite, regex_rewrite and path_rewrite may be set",
        )),
    }
}

fn host_rewrite(pb: Option<pb::route_action::HostRewriteSpecifier>) -> Result<HostRewrite, Invalid> {
    use pb::route_action::HostRewriteSpecifier as Pb;
    Ok(match pb {
        None => HostRewrite::None,
        Some(Pb::HostRewriteLiteral(h)) => HostRewrite::Literal(header_value(&h, "host_rewrite_literal")?),
        Some(Pb::AutoHostRewrite(b)) if b.value => HostRewrite::Auto,
        Some(Pb::AutoHostRewrite(_)) => HostRewrite::None,
        Some(Pb::HostRewriteHeader(h)) => HostRewrite::Header(header_name(&h, "host_rewrite_header")?),
        Some(Pb::HostRewritePathRegex(r)) => {
            HostRewrite::PathRegex(RegexRewrite::new(r).under("host_rewrite_path_regex")?)
        }
        Some(Pb::HostRewrite(_)) => return Err(Invalid::unsupported("host_rewrite")),
    })
}

fn cluster_choice(
    pb: Option<pb::route_action::ClusterSpecifier>,
    level: &Arc<PerFilter>,
    clusters: &mut ClusterNames,
) -> Result<ClusterChoice, Invalid> {
    use pb::route_action::ClusterSpecifier as Pb;
    match pb {
        Some(Pb::Cluster(name)) if !name.is_empty() => Ok(ClusterChoice::One(clusters.intern(&name))),
        Some(Pb::ClusterHeader(name)) => {
            if name.starts_with(':') {
                return Err(Invalid::unsupported("cluster_header"));
            }
            header_name(&name, "cluster_header").map(ClusterChoice::Header)
        }
        Some(Pb::WeightedClusters(w)) => {
            weighted(w, level, clusters).under("weighted_clusters").map(ClusterChoice::Weighted)
        }
        Some(Pb::ClusterSpecifierPlugin(_) | Pb::InlineClusterSpecifierPlugin(_)) => {
            Err(Invalid::unsupported("cluster_specifier_plugin"))
        }
        Some(Pb::Cluster(_)) | None => Err(Invalid::missing("cluster")),
    }
}

fn weighted(
    pb: pb::WeightedCluster,
    level: &Arc<PerFilter>,
    clusters: &mut ClusterNames,
) -> Result<Weighted, Invalid> {
    if pb.random_value_specifier.is_some() {
        return Err(Invalid::unsupported("random_value_specifier"));
    }
    let mut total = 0_u64;
    let mut list = Vec::with_capacity(pb.clusters.len());
    for (i, c) in pb.clusters.into_iter().enumerate() {
        total += u64::from(u32_or(c.weight, 0));
        list.push(weighted_cluster(c, total, level, clusters).at("clusters", i)?);
    }
    if total == 0 || total > u64::from(u32::MAX) {
        return Err(Invalid::new("clusters", format!("the sum of weights is {total}, not from 1 to 2^32-1")));
    }
    Ok(Weighted { clusters: list.into(), total })
}

fn weighted_cluster(
    pb: pb::weighted_cluster::ClusterWeight,
    until: u64,
    level: &Arc<PerFilter>,
    clusters: &mut ClusterNames,
) -> Result<WeightedCluster, Invalid> {
    use pb::weighted_cluster::cluster_weight::HostRewriteSpecifier::HostRewriteLiteral;
    if !pb.cluster_header.is_empty() {
        return Err(Invalid::unsupported("cluster_header"));
    }
    if pb.metadata_match.is_some() {
        return Err(Invalid::unsupported("metadata_match"));
    }
    if pb.name.is_empty() {
        return Err(Invalid::missing("name"));
    }
    let host_rewrite = match pb.host_rewrite_specifier {
        Some(HostRewriteLiteral(h)) => Some(header_value(&h, "host_rewrite_literal")?),
        None => None,
    };
    Ok(WeightedCluster {
        cluster: clusters.intern(&pb.name),
        until,
        request_headers: HeaderOps::new(pb.request_headers_to_add, &pb.request_headers_to_remove, "request")?,
        response_headers: HeaderOps::new(
            pb.response_headers_to_add,
            &pb.response_headers_to_remove,
            "response",
        )?,
        per_filter: per_filter(level, pb.typed_per_filter_config)?,
        host_rewrite,
    })
}

pub(super) fn mirrors(
    pb: Vec<pb::route_action::RequestMirrorPolicy>,
    clusters: &mut ClusterNames,
) -> Result<Box<[MirrorPolicy]>, Invalid> {
    pb.into_iter().enumerate().map(|(i, m)| mirror(m, clusters).at("request_mirror_policies", i)).collect()
}

fn mirror(
    pb: pb::route_action::RequestMirrorPolicy,
    clusters: &mut ClusterNames,
) -> Result<MirrorPolicy, Invalid> {
    if !pb.cluster_header.is_empty() {
        return Err(Invalid::unsupported("cluster_header"));
    }
    if !pb.request_headers_mutations.is_empty() {
        return Err(Invalid::unsupported("request_headers_mutations"));
    }
    if pb.cluster.is_empty() {
        return Err(Invalid::missing("cluster"));
    }
    let host = &pb.host_rewrite_literal;
    Ok(MirrorPolicy {
        cluster: clusters.intern(&pb.cluster),
        fraction: runtime_fraction(pb.runtime_fraction, "runtime_fraction")?.unwrap_or(Fraction::ALL),
        keep_host: pb.disable_shadow_host_suffix_append,
        host_rewrite: if host.is_empty() { None } else { Some(header_value(host, "host_rewrite_literal")?) },
    })
}

fn hash_policy(pb: pb::route_action::HashPolicy) -> Result<HashPolicy, Invalid> {
    use pb::route_action::hash_policy::PolicySpecifier as Pb;
    let on = match pb.policy_specifier {
        None => return Err(Invalid::missing("policy_specifier")),
        Some(Pb::FilterState(_)) => return Err(Invalid::unsupported("filter_state")),
        Some(Pb::Header(h)) => {
            let rewrite = h.regex_rewrite.map(RegexRewrite::new).transpose().under("header.regex_rewrite")?;
            HashOn::Header(HeaderKey::new(&h.header_name, "header.header_name")?, rewrite)
        }
        Some(Pb::Cookie(c)) => HashOn::Cookie {
            ttl: opt_duration(c.ttl, "cookie.ttl")?,
            path: (!c.path.is_empty()).then(|| c.path.into()),
            attributes: c.attributes.iter().map(cookie_attribute).collect::<String>().into(),
            name: c.name.into(),
        },
        Some(Pb::ConnectionProperties(c)) if c.source_ip => HashOn::SourceIp,
        Some(Pb::ConnectionProperties(_)) => return Err(Invalid::missing("connection_properties.source_ip")),
        Some(Pb::QueryParameter(q)) => HashOn::Query(q.name.into()),
    };
    Ok(HashPolicy { on, terminal: pb.terminal })
}

fn cookie_attribute(pb: &pb::route_action::hash_policy::CookieAttribute) -> String {
    if pb.value.is_empty() { format!("; {}", pb.name) } else { format!("; {}={}", pb.name, pb.value) }
}

fn redirect(pb: pb::RedirectAction) -> Result<Redirect, Invalid> {
    use pb::redirect_action::{PathRewriteSpecifier as Path, SchemeRewriteSpecifier as SchemePb};
    let status = match pb.response_code {
        0 => StatusCode::MOVED_PERMANENTLY,
        1 => StatusCode::FOUND,
        2 => StatusCode::SEE_OTHER,
        3 => StatusCode::TEMPORARY_REDIRECT,
        4 => StatusCode::PERMANENT_REDIRECT,
        other => return Err(Invalid::new("response_code", format!("unknown value {other}"))),
    };
    let scheme = match pb.scheme_rewrite_specifier {
        None | Some(SchemePb::HttpsRedirect(false)) => None,
        Some(SchemePb::HttpsRedirect(true)) => Some(Scheme::HTTPS),
        Some(SchemePb::SchemeRedirect(s)) => {
            Some(s.parse().map_err(|_| Invalid::new("scheme_redirect", format!("`{s}` is not a scheme")))?)
        }
    };
    let path = match pb.path_rewrite_specifier {
        None => PathRewrite::None,
        Some(Path::PathRedirect(p) | Path::PathRewrite(p)) => PathRewrite::Full(p.into()),
        Some(Path::PrefixRewrite(p)) => PathRewrite::Prefix(p.into()),
        Some(Path::RegexRewrite(r)) => PathRewrite::Regex(RegexRewrite::new(r).under("regex_rewrite")?),
    };
    let port = match pb.port_redirect {
        0 => None,
        p => Some(crate::xds::decode::port(p, "port_redirect")?),
    };
    let host = (!pb.host_redirect.is_empty()).then(|| pb.host_redirect.into());
    Ok(Redirect { status, scheme, host, port, path, strip_query: pb.strip_query })
}

fn direct(pb: pb::DirectResponseAction) -> Result<DirectResponse, Invalid> {
    if pb.body_format.is_some() {
        return Err(Invalid::unsupported("body_format"));
    }
    let status = status(pb.status, "status")?;
    let body = pb.body.map(data_source).transpose().under("body")?.unwrap_or_default();
    Ok(DirectResponse { status, body: body.into() })
}
