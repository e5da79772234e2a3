//! The control plane of a bootstrap file: an ADS source, and the static cluster behind it.

use std::sync::Arc;

use ca::tls::{
    Anchors, ClientTls, ExpectedIdentities, MinVersion, NameKind, NameMatch, NameMatcher, Own, Trust, Verify,
};
use envoy_types::pb::envoy::config::core::v3 as core;
use rustls_pki_types::ServerName;

use crate::tables::{Change, Update};
use crate::xds::client::Protocol;
use crate::xds::cluster::{Cluster, Discovery};
use crate::xds::decode::{Invalid, Under as _};
use crate::xds::matcher::StringMatcher;
use crate::xds::tls::{
    CertSource, RootSource, SanKind, SanMatcher, Secret, TlsVersion, UpstreamTls, Validation,
};
use crate::xds::transport::{ServerTls, Settings};

/// Where the control plane is and how it is spoken to.
pub(super) fn settings(pb: core::ApiConfigSource, resources: &Update) -> Result<Settings, Invalid> {
    use core::api_config_source::ApiType;
    let protocol = match ApiType::try_from(pb.api_type) {
        Ok(ApiType::Grpc | ApiType::AggregatedGrpc) => Protocol::Sotw,
        Ok(ApiType::DeltaGrpc | ApiType::AggregatedDeltaGrpc) => Protocol::Delta,
        Ok(_) | Err(_) => return Err(Invalid::new("api_type", "must be GRPC or DELTA_GRPC")),
    };
    let envoy = match pb.grpc_services.into_iter().next().and_then(|s| s.target_specifier) {
        Some(core::grpc_service::TargetSpecifier::EnvoyGrpc(envoy)) => envoy,
        Some(core::grpc_service::TargetSpecifier::GoogleGrpc(_)) => {
            return Err(Invalid::unsupported("grpc_services[0].google_grpc"));
        }
        None => return Err(Invalid::missing("grpc_services[0].envoy_grpc")),
    };
    let field = "grpc_services[0].envoy_grpc.cluster_name";
    let find = |c: &Change| {
        let Change::Cluster(held) = c else { return None };
        (*held.value.name == *envoy.cluster_name).then(|| Arc::clone(&held.value))
    };
    let cluster = resources
        .changes
        .iter()
        .find_map(find)
        .ok_or_else(|| Invalid::new(field, format!("no static cluster `{}`", envoy.cluster_name)))?;
    let servers = match &cluster.discovery {
        Discovery::Static(own) | Discovery::StrictDns(own, _) | Discovery::LogicalDns(own, _) => {
            own.endpoints().map(|e| e.address.clone()).collect::<Vec<_>>()
        }
        Discovery::Eds { .. } | Discovery::OriginalDst(_) => Vec::new(),
    };
    if servers.is_empty() {
        return Err(Invalid::new(field, format!("cluster `{}` has no endpoints of its own", cluster.name)));
    }
    let tls = server_tls(&cluster, resources).under(&format!("static cluster `{}`", cluster.name))?;
    let authority = (!envoy.authority.is_empty()).then_some(envoy.authority);
    Ok(Settings { servers, members: None, tls, protocol, authority })
}

fn server_tls(cluster: &Cluster, resources: &Update) -> Result<Option<ServerTls>, Invalid> {
    let Some(tls) = &cluster.transport.tls else { return Ok(None) };
    let config = ClientTls {
        own: own(tls, resources)?,
        verify: verify(tls.common.validation.as_ref(), resources)?,
        alpn: vec![b"h2".to_vec()],
        min_version: match tls.common.min_version {
            TlsVersion::V1_2 => MinVersion::Tls12,
            TlsVersion::V1_3 => MinVersion::Tls13,
        },
    };
    let config = config.build().map_err(|e| Invalid::new("transport_socket", e.to_string()))?;
    let name = tls.sni.as_ref().map(|sni| {
        ServerName::try_from(sni.to_string()).map_err(|e| Invalid::new("transport_socket.sni", e.to_string()))
    });
    Ok(Some(ServerTls { config, name: name.transpose()? }))
}

fn static_secret<'a>(name: &str, resources: &'a Update) -> Option<&'a Secret> {
    resources.changes.iter().find_map(|c| {
        let Change::Secret(n, secret) = c else { return None };
        (**n == *name).then_some(&**secret)
    })
}

fn own(tls: &UpstreamTls, resources: &Update) -> Result<Own, Invalid> {
    let pem = match &tls.common.certificate {
        None => return Ok(Own::Nothing),
        Some(CertSource::Pem(pems)) => pems.first(),
        Some(CertSource::Sds(name)) => match static_secret(name, resources) {
            Some(Secret::Certificate(pem)) => Some(pem),
            _ => {
                return Err(Invalid::new(
                    "tls_certificate_sds_secret_configs",
                    format!("no secret `{name}`"),
                ));
            }
        },
    };
    let Some(pem) = pem else { return Ok(Own::Nothing) };
    ca::tls::certified_key_from_pem(&pem.chain, &pem.key)
        .map(|key| Own::Fixed(Arc::new(key)))
        .map_err(|e| Invalid::new("tls_certificates", e.to_string()))
}

fn verify(validation: Option<&Validation>, resources: &Update) -> Result<Verify, Invalid> {
    let Some(validation) = validation.filter(|v| !v.accept_untrusted) else { return Ok(Verify::Nothing) };
    let pem = match &validation.roots {
        RootSource::None => return Ok(Verify::Nothing),
        RootSource::Pem(pem) => pem,
        RootSource::Sds(name) => match static_secret(name, resources) {
            Some(Secret::Validation(Validation { roots: RootSource::Pem(pem), .. })) => pem,
            _ => {
                return Err(Invalid::new(
                    "validation_context_sds_secret_config",
                    format!("no secret `{name}`"),
                ));
            }
        },
    };
    let anchors = Anchors::from_pem(pem).map_err(|e| Invalid::new("trusted_ca", e.to_string()))?;
    let names = validation.sans.iter().map(name).collect::<Result<Vec<_>, _>>()?;
    Ok(Verify::Peer { trust: Trust::Fixed(Arc::new(anchors)), expected: ExpectedIdentities::Names(names) })
}

fn name(san: &SanMatcher) -> Result<NameMatcher, Invalid> {
    let kind = match san.kind {
        SanKind::Dns => NameKind::Dns,
        SanKind::Uri => NameKind::Uri,
        SanKind::Any => NameKind::Any,
        SanKind::Email | SanKind::Ip => {
            return Err(Invalid::unsupported("match_typed_subject_alt_names.san_type"));
        }
    };
    let (value, ignore_case) = if let StringMatcher::IgnoreCase(inner) = &san.value {
        (&**inner, true)
    } else {
        (&san.value, false)
    };
    let rule = match value {
        StringMatcher::Exact(s) => NameMatch::Exact(s.to_string()),
        StringMatcher::Prefix(s) => NameMatch::Prefix(s.to_string()),
        StringMatcher::Suffix(s) => NameMatch::Suffix(s.to_string()),
        StringMatcher::Contains(s) => NameMatch::Contains(s.to_string()),
        StringMatcher::Regex(_) | StringMatcher::IgnoreCase(_) => {
            return Err(Invalid::unsupported("match_typed_subject_alt_names.matcher"));
        }
    };
    Ok(NameMatcher { kind, rule, ignore_case })
}
