//! Short constructors for the protobuf messages that every part of the translation needs.

use std::net::IpAddr;
use std::time::Duration;

use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::config::listener::v3 as listener;
use envoy_types::pb::envoy::extensions::filters::network::http_connection_manager::v3 as hcm;
use envoy_types::pb::envoy::r#type::matcher::v3 as matcher;
use envoy_types::pb::envoy::r#type::v3 as kind;
use envoy_types::pb::google::protobuf as google;
use ipnet::IpNet;
use prost::{Message, Name};

/// Packs a message into an `Any`. Map entries are put in order once, when the whole resource is encoded.
pub(super) fn any<M: Message + Name>(message: &M) -> google::Any {
    google::Any {
        type_url: format!("{}{}", wire::TYPE_URL_PREFIX, M::full_name()),
        value: message.encode_to_vec(),
    }
}

pub(super) fn u32v(value: u32) -> Option<google::UInt32Value> {
    Some(google::UInt32Value { value })
}

pub(super) fn u64v(value: u64) -> Option<google::UInt64Value> {
    Some(google::UInt64Value { value })
}

pub(super) fn boolv(value: bool) -> Option<google::BoolValue> {
    Some(google::BoolValue { value })
}

/// A duration; what does not fit in protobuf's range (ten thousand years) becomes its maximum.
pub(super) fn duration(value: Duration) -> google::Duration {
    google::Duration {
        seconds: i64::try_from(value.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(value.subsec_nanos()).unwrap_or_default(),
    }
}

pub(super) fn zero() -> Option<google::Duration> {
    Some(google::Duration::default())
}

pub(super) fn percent(value: f64) -> kind::Percent {
    kind::Percent { value }
}

/// A percentage with four decimals, as Istio sends it: parts of a million.
pub(super) fn fraction(percent: f64) -> kind::FractionalPercent {
    let parts = (percent.clamp(0.0, 100.0) * 10_000.0).round();
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped to 0..=1_000_000")]
    let numerator = parts as u32;
    kind::FractionalPercent {
        numerator,
        denominator: kind::fractional_percent::DenominatorType::Million.into(),
    }
}

pub(super) fn runtime_fraction(percent: f64) -> core::RuntimeFractionalPercent {
    core::RuntimeFractionalPercent { default_value: Some(fraction(percent)), runtime_key: String::new() }
}

pub(super) fn socket_address(address: &str, port: u16) -> core::Address {
    core::Address {
        address: Some(core::address::Address::SocketAddress(core::SocketAddress {
            address: address.to_owned(),
            port_specifier: Some(core::socket_address::PortSpecifier::PortValue(port.into())),
            ..Default::default()
        })),
    }
}

pub(super) fn pipe(path: &str) -> core::Address {
    core::Address {
        address: Some(core::address::Address::Pipe(core::Pipe { path: path.to_owned(), mode: 0 })),
    }
}

pub(super) fn cidr(net: IpNet) -> core::CidrRange {
    core::CidrRange { address_prefix: net.network().to_string(), prefix_len: u32v(net.prefix_len().into()) }
}

/// Parses an address or a CIDR block.
pub(super) fn parse_net(text: &str) -> Option<IpNet> {
    text.parse::<IpNet>().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from))
}

/// "Ask for it on the stream you already have."
pub(super) fn ads() -> Option<core::ConfigSource> {
    Some(core::ConfigSource {
        initial_fetch_timeout: zero(),
        resource_api_version: core::ApiVersion::V3.into(),
        config_source_specifier: Some(core::config_source::ConfigSourceSpecifier::Ads(
            core::AggregatedConfigSource {},
        )),
        ..Default::default()
    })
}

pub(super) fn text(value: impl Into<String>) -> google::Value {
    google::Value { kind: Some(google::value::Kind::StringValue(value.into())) }
}

pub(super) fn number(value: f64) -> google::Value {
    google::Value { kind: Some(google::value::Kind::NumberValue(value)) }
}

pub(super) fn list(values: Vec<google::Value>) -> google::Value {
    google::Value { kind: Some(google::value::Kind::ListValue(google::ListValue { values })) }
}

pub(super) fn nested(value: google::Struct) -> google::Value {
    google::Value { kind: Some(google::value::Kind::StructValue(value)) }
}

pub(super) fn structure<const N: usize>(fields: [(&str, google::Value); N]) -> google::Struct {
    google::Struct { fields: fields.into_iter().map(|(k, v)| (k.to_owned(), v)).collect() }
}

pub(super) fn metadata<const N: usize>(filters: [(&str, google::Struct); N]) -> core::Metadata {
    core::Metadata {
        filter_metadata: filters.into_iter().map(|(k, v)| (k.to_owned(), v)).collect(),
        ..Default::default()
    }
}

pub(super) fn exact(value: impl Into<String>) -> matcher::StringMatcher {
    pattern(matcher::string_matcher::MatchPattern::Exact(value.into()))
}

pub(super) fn prefix(value: impl Into<String>) -> matcher::StringMatcher {
    pattern(matcher::string_matcher::MatchPattern::Prefix(value.into()))
}

pub(super) fn suffix(value: impl Into<String>) -> matcher::StringMatcher {
    pattern(matcher::string_matcher::MatchPattern::Suffix(value.into()))
}

pub(super) fn regex(value: impl Into<String>) -> matcher::StringMatcher {
    pattern(matcher::string_matcher::MatchPattern::SafeRegex(regex_matcher(value)))
}

pub(super) fn regex_matcher(value: impl Into<String>) -> matcher::RegexMatcher {
    matcher::RegexMatcher { regex: value.into(), engine_type: None }
}

fn pattern(pattern: matcher::string_matcher::MatchPattern) -> matcher::StringMatcher {
    matcher::StringMatcher { match_pattern: Some(pattern), ignore_case: false }
}

pub(super) fn http_filter<M: Message + Name>(name: &str, config: &M) -> hcm::HttpFilter {
    hcm::HttpFilter {
        name: name.to_owned(),
        config_type: Some(hcm::http_filter::ConfigType::TypedConfig(any(config))),
        ..Default::default()
    }
}

pub(super) fn network_filter<M: Message + Name>(name: &str, config: &M) -> listener::Filter {
    listener::Filter {
        name: name.to_owned(),
        config_type: Some(listener::filter::ConfigType::TypedConfig(any(config))),
    }
}

pub(super) fn transport_socket<M: Message + Name>(name: &str, config: &M) -> core::TransportSocket {
    core::TransportSocket {
        name: name.to_owned(),
        config_type: Some(core::transport_socket::ConfigType::TypedConfig(any(config))),
    }
}

pub(super) fn inline_string(value: impl Into<String>) -> core::DataSource {
    core::DataSource {
        specifier: Some(core::data_source::Specifier::InlineString(value.into())),
        ..Default::default()
    }
}

pub(super) fn inline_bytes(value: Vec<u8>) -> core::DataSource {
    core::DataSource {
        specifier: Some(core::data_source::Specifier::InlineBytes(value)),
        ..Default::default()
    }
}

pub(super) fn file(path: impl Into<String>) -> core::DataSource {
    core::DataSource {
        specifier: Some(core::data_source::Specifier::Filename(path.into())),
        ..Default::default()
    }
}
