//! Command operators (`%REQ(X-REQUEST-ID)%`) parsed once: of access logs and of header values.
//!
//! The language is Envoy's; an operator that this proxy does not know refuses the resource.

use std::str::FromStr;

use http::HeaderName;
use serde_json::Value as Json;

use super::decode::Invalid;
use super::matcher::HeaderKey;

/// Text with operators in it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Format(pub Box<[Part]>);

/// A piece of a [`Format`].
#[derive(Debug, Clone, PartialEq)]
pub enum Part {
    /// Text that is written as it is.
    Text(Box<str>),
    /// Something about the request, and the most bytes of it that are written.
    Operator(Operator, Option<usize>),
}

/// Whose headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The request's.
    Request,
    /// The response's.
    Response,
    /// The response's trailers.
    Trailer,
}

/// An address's parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressPart {
    /// `ip:port`
    Whole,
    /// `ip`
    Ip,
    /// `port`
    Port,
}

/// Whose metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MetadataOf {
    /// The request's own, written by filters.
    Dynamic,
    /// The upstream cluster's.
    Cluster,
    /// The upstream endpoint's.
    Upstream,
    /// The route's.
    Route,
}

/// One operator.
#[derive(Debug, Clone, PartialEq)]
pub enum Operator {
    /// `REQ`, `RESP`, `TRAILER`: a header, or else another.
    Header(Side, HeaderKey, Option<HeaderKey>),
    /// `START_TIME`, with a format of `strftime`, or RFC 3339 with milliseconds.
    StartTime(Option<Box<str>>),
    /// `PROTOCOL`
    Protocol,
    /// `RESPONSE_CODE`
    ResponseCode,
    /// `RESPONSE_FLAGS`
    ResponseFlags,
    /// `RESPONSE_CODE_DETAILS`
    ResponseCodeDetails,
    /// `CONNECTION_TERMINATION_DETAILS`
    ConnectionTerminationDetails,
    /// `UPSTREAM_TRANSPORT_FAILURE_REASON`
    UpstreamTransportFailureReason,
    /// `DOWNSTREAM_TRANSPORT_FAILURE_REASON`
    DownstreamTransportFailureReason,
    /// `BYTES_RECEIVED`
    BytesReceived,
    /// `BYTES_SENT`
    BytesSent,
    /// `DURATION`, in milliseconds
    Duration,
    /// `REQUEST_DURATION`: until the last byte of the request
    RequestDuration,
    /// `RESPONSE_DURATION`: until the first byte of the response
    ResponseDuration,
    /// `RESPONSE_TX_DURATION`: from the first to the last byte of the response
    ResponseTxDuration,
    /// `UPSTREAM_HOST`
    UpstreamHost,
    /// `UPSTREAM_CLUSTER`: the name under which it is observed
    UpstreamCluster,
    /// `UPSTREAM_CLUSTER_RAW`: its own name
    UpstreamClusterRaw,
    /// `UPSTREAM_LOCAL_ADDRESS`
    UpstreamLocal(AddressPart),
    /// `UPSTREAM_REMOTE_ADDRESS`
    UpstreamRemote(AddressPart),
    /// `UPSTREAM_REQUEST_ATTEMPT_COUNT`
    UpstreamAttempts,
    /// `DOWNSTREAM_LOCAL_ADDRESS`
    DownstreamLocal(AddressPart),
    /// `DOWNSTREAM_REMOTE_ADDRESS`, with forwarding headers taken into account
    DownstreamRemote(AddressPart),
    /// `DOWNSTREAM_DIRECT_REMOTE_ADDRESS`: of the connection itself
    DownstreamDirectRemote(AddressPart),
    /// `REQUESTED_SERVER_NAME`
    RequestedServerName,
    /// `ROUTE_NAME`
    RouteName,
    /// `HOSTNAME`: this machine's
    Hostname,
    /// `CONNECTION_ID`
    ConnectionId,
    /// `STREAM_ID` and `UNIQUE_ID`
    StreamId,
    /// `DOWNSTREAM_PEER_URI_SAN`
    PeerUriSan,
    /// `DOWNSTREAM_PEER_SUBJECT`
    PeerSubject,
    /// `DOWNSTREAM_PEER_FINGERPRINT_256`
    PeerFingerprint,
    /// `DOWNSTREAM_LOCAL_URI_SAN`
    LocalUriSan,
    /// `DOWNSTREAM_TLS_VERSION`
    TlsVersion,
    /// `DOWNSTREAM_TLS_CIPHER`
    TlsCipher,
    /// `UPSTREAM_PEER_URI_SAN`
    UpstreamPeerUriSan,
    /// `DYNAMIC_METADATA`, `CLUSTER_METADATA`, `UPSTREAM_METADATA`, `ROUTE_METADATA`: a filter and keys below it
    Metadata(MetadataOf, Box<str>, Box<[Box<str>]>),
    /// `FILTER_STATE`: an object that a filter left
    FilterState(Box<str>),
    /// `GRPC_STATUS`: as a name (`true`) or a number
    GrpcStatus(bool),
}

impl Format {
    /// From its text.
    ///
    /// # Errors
    ///
    /// A lone `%`, an unknown operator, or arguments it does not take.
    pub fn parse(text: &str) -> Result<Self, Invalid> {
        let fail = |reason: String| Invalid::new("", format!("`{text}`: {reason}"));
        let mut parts: Vec<Part> = Vec::new();
        let mut plain = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('%') {
            plain.push_str(before);
            if let Some(after) = after.strip_prefix('%') {
                plain.push('%');
                rest = after;
                continue;
            }
            let (command, after) =
                command_end(after).ok_or_else(|| fail("a `%` without its second one".into()))?;
            if !plain.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut plain).into()));
            }
            parts.push(operator(command).map_err(fail)?);
            rest = after;
        }
        plain.push_str(rest);
        if !plain.is_empty() {
            parts.push(Part::Text(plain.into()));
        }
        Ok(Self(parts.into()))
    }

    /// The text, if there is no operator in it.
    #[must_use]
    pub fn constant(&self) -> Option<&str> {
        match &*self.0 {
            [] => Some(""),
            [Part::Text(text)] => Some(text),
            _ => None,
        }
    }
}

/// Splits after the `%` that ends the operator; arguments in brackets may hold `%` themselves.
fn command_end(text: &str) -> Option<(&str, &str)> {
    let mut depth = 0_u32;
    for (i, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            '%' if depth == 0 => return Some((text.get(..i)?, text.get(i + 1..)?)),
            _ => {}
        }
    }
    None
}

fn operator(command: &str) -> Result<Part, String> {
    let (name, arguments, limit) = match command.split_once('(') {
        None => {
            let (name, limit) = command.split_once(':').map_or((command, ""), |(n, l)| (n, l));
            (name, None, limit)
        }
        Some((name, rest)) => {
            let (arguments, limit) =
                rest.rsplit_once(')').ok_or_else(|| format!("`{command}` has no closing bracket"))?;
            (name, Some(arguments), limit.strip_prefix(':').unwrap_or(limit))
        }
    };
    let limit = match limit {
        "" => None,
        n => Some(usize::from_str(n).map_err(|_| format!("`{n}` in `{command}` is not a length"))?),
    };
    let operator = match arguments {
        Some(arguments) => with_arguments(name, arguments)?,
        None => without_arguments(name).ok_or_else(|| format!("unknown operator `{name}`"))?,
    };
    Ok(Part::Operator(operator, limit))
}

fn with_arguments(name: &str, arguments: &str) -> Result<Operator, String> {
    let metadata = |of| {
        let (filter, keys) = arguments.split_once(':').unwrap_or((arguments, ""));
        if filter.is_empty() {
            return Err(format!("`{name}` needs a namespace"));
        }
        let keys = keys.split(':').filter(|k| !k.is_empty()).map(Box::from).collect();
        Ok(Operator::Metadata(of, filter.into(), keys))
    };
    match name {
        "REQ" => header(Side::Request, arguments),
        "RESP" => header(Side::Response, arguments),
        "TRAILER" => header(Side::Trailer, arguments),
        "START_TIME" if arguments.is_empty() => Ok(Operator::StartTime(None)),
        "START_TIME" => Ok(Operator::StartTime(Some(arguments.into()))),
        "DYNAMIC_METADATA" => metadata(MetadataOf::Dynamic),
        "CLUSTER_METADATA" => metadata(MetadataOf::Cluster),
        "UPSTREAM_METADATA" => metadata(MetadataOf::Upstream),
        "METADATA" => match arguments.split_once(':') {
            Some(("DYNAMIC", rest)) => with_arguments("DYNAMIC_METADATA", rest),
            Some(("CLUSTER", rest)) => with_arguments("CLUSTER_METADATA", rest),
            Some(("UPSTREAM_HOST", rest)) => with_arguments("UPSTREAM_METADATA", rest),
            Some(("ROUTE", rest)) => {
                let mut keys = rest.split(':').map(Box::from);
                let filter = keys.next().ok_or("`METADATA` needs a namespace")?;
                Ok(Operator::Metadata(MetadataOf::Route, filter, keys.collect()))
            }
            _ => Err(format!("`METADATA({arguments})`: unknown kind")),
        },
        "FILTER_STATE" => {
            let key = arguments.split(':').next().unwrap_or_default();
            Ok(Operator::FilterState(key.into()))
        }
        "GRPC_STATUS" => match arguments {
            "" | "CAMEL_STRING" | "SNAKE_STRING" => Ok(Operator::GrpcStatus(true)),
            "NUMBER" => Ok(Operator::GrpcStatus(false)),
            other => Err(format!("`GRPC_STATUS({other})`: unknown form")),
        },
        _ => Err(format!("unknown operator `{name}` with arguments")),
    }
}

fn header(side: Side, arguments: &str) -> Result<Operator, String> {
    let key = |name: &str| match (name.starts_with(':'), side) {
        // Envoy has this one under `X-ENVOY-ORIGINAL-PATH?:PATH`.
        (true, Side::Request) => HeaderKey::new(name, "").map_err(|e| e.reason),
        (true, _) => Err(format!("`{name}` is not a header of a response")),
        (false, _) => HeaderName::from_bytes(name.as_bytes())
            .map_err(|_| format!("`{name}` is not a header name"))
            .map(|n| if n == "host" { HeaderKey::Authority } else { HeaderKey::Name(n) }),
    };
    match arguments.split_once('?') {
        None => Ok(Operator::Header(side, key(arguments)?, None)),
        Some((first, second)) => Ok(Operator::Header(side, key(first)?, Some(key(second)?))),
    }
}

fn without_arguments(name: &str) -> Option<Operator> {
    use AddressPart::{Ip, Port, Whole};
    Some(match name {
        "START_TIME" => Operator::StartTime(None),
        "PROTOCOL" => Operator::Protocol,
        "RESPONSE_CODE" => Operator::ResponseCode,
        "RESPONSE_FLAGS" => Operator::ResponseFlags,
        "RESPONSE_CODE_DETAILS" => Operator::ResponseCodeDetails,
        "CONNECTION_TERMINATION_DETAILS" => Operator::ConnectionTerminationDetails,
        "UPSTREAM_TRANSPORT_FAILURE_REASON" => Operator::UpstreamTransportFailureReason,
        "DOWNSTREAM_TRANSPORT_FAILURE_REASON" => Operator::DownstreamTransportFailureReason,
        "BYTES_RECEIVED" => Operator::BytesReceived,
        "BYTES_SENT" => Operator::BytesSent,
        "DURATION" => Operator::Duration,
        "REQUEST_DURATION" => Operator::RequestDuration,
        "RESPONSE_DURATION" => Operator::ResponseDuration,
        "RESPONSE_TX_DURATION" => Operator::ResponseTxDuration,
        "UPSTREAM_HOST" => Operator::UpstreamHost,
        "UPSTREAM_CLUSTER" => Operator::UpstreamCluster,
        "UPSTREAM_CLUSTER_RAW" => Operator::UpstreamClusterRaw,
        "UPSTREAM_LOCAL_ADDRESS" => Operator::UpstreamLocal(Whole),
        "UPSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => Operator::UpstreamLocal(Ip),
        "UPSTREAM_LOCAL_PORT" => Operator::UpstreamLocal(Port),
        "UPSTREAM_REMOTE_ADDRESS" => Operator::UpstreamRemote(Whole),
        "UPSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => Operator::UpstreamRemote(Ip),
        "UPSTREAM_REMOTE_PORT" => Operator::UpstreamRemote(Port),
        "UPSTREAM_REQUEST_ATTEMPT_COUNT" => Operator::UpstreamAttempts,
        "DOWNSTREAM_LOCAL_ADDRESS" => Operator::DownstreamLocal(Whole),
        "DOWNSTREAM_LOCAL_ADDRESS_WITHOUT_PORT" => Operator::DownstreamLocal(Ip),
        "DOWNSTREAM_LOCAL_PORT" => Operator::DownstreamLocal(Port),
        "DOWNSTREAM_REMOTE_ADDRESS" => Operator::DownstreamRemote(Whole),
        "DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT" => Operator::DownstreamRemote(Ip),
        "DOWNSTREAM_REMOTE_PORT" => Operator::DownstreamRemote(Port),
        "DOWNSTREAM_DIRECT_REMOTE_ADDRESS" => Operator::DownstreamDirectRemote(Whole),
        "DOWNSTREAM_DIRECT_REMOTE_ADDRESS_WITHOUT_PORT" => Operator::DownstreamDirectRemote(Ip),
        "DOWNSTREAM_DIRECT_REMOTE_PORT" => Operator::DownstreamDirectRemote(Port),
        "REQUESTED_SERVER_NAME" => Operator::RequestedServerName,
        "ROUTE_NAME" => Operator::RouteName,
        "HOSTNAME" => Operator::Hostname,
        "CONNECTION_ID" => Operator::ConnectionId,
        "STREAM_ID" | "UNIQUE_ID" => Operator::StreamId,
        "DOWNSTREAM_PEER_URI_SAN" => Operator::PeerUriSan,
        "DOWNSTREAM_PEER_SUBJECT" => Operator::PeerSubject,
        "DOWNSTREAM_PEER_FINGERPRINT_256" => Operator::PeerFingerprint,
        "DOWNSTREAM_LOCAL_URI_SAN" => Operator::LocalUriSan,
        "DOWNSTREAM_TLS_VERSION" => Operator::TlsVersion,
        "DOWNSTREAM_TLS_CIPHER" => Operator::TlsCipher,
        "UPSTREAM_PEER_URI_SAN" => Operator::UpstreamPeerUriSan,
        "GRPC_STATUS" => Operator::GrpcStatus(true),
        "GRPC_STATUS_NUMBER" => Operator::GrpcStatus(false),
        _ => return None,
    })
}

/// A JSON log line: values are formats.
#[derive(Debug, Clone, PartialEq)]
pub enum JsonFormat {
    /// A string; one that is a single operator keeps the operator's type (number or null).
    Value(Format),
    /// A number, boolean or null that is written as it is.
    Constant(Json),
    /// Fields in order.
    Object(Box<[(Box<str>, JsonFormat)]>),
    /// Elements.
    List(Box<[JsonFormat]>),
}

impl JsonFormat {
    /// From the JSON that a configuration holds.
    ///
    /// # Errors
    ///
    /// As [`Format::parse`].
    pub fn new(json: &Json) -> Result<Self, Invalid> {
        Ok(match json {
            Json::String(s) => Self::Value(Format::parse(s)?),
            Json::Object(fields) => Self::Object(
                fields
                    .iter()
                    .map(|(k, v)| Ok((k.as_str().into(), Self::new(v)?)))
                    .collect::<Result<_, Invalid>>()?,
            ),
            Json::Array(items) => Self::List(items.iter().map(Self::new).collect::<Result<_, _>>()?),
            Json::Null | Json::Bool(_) | Json::Number(_) => Self::Constant(json.clone()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn istios_default_line_parses() {
        let line = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" \
             %RESPONSE_CODE% %RESPONSE_FLAGS% %RESPONSE_CODE_DETAILS% %CONNECTION_TERMINATION_DETAILS% \
             \"%UPSTREAM_TRANSPORT_FAILURE_REASON%\" %BYTES_RECEIVED% %BYTES_SENT% %DURATION% \
             %RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \
             \"%REQ(X-REQUEST-ID)%\" \"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\" %UPSTREAM_CLUSTER_RAW% \
             %UPSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS% %DOWNSTREAM_REMOTE_ADDRESS% \
             %REQUESTED_SERVER_NAME% %ROUTE_NAME%\n";
        let format = Format::parse(line).unwrap();
        assert_eq!(format.0.iter().filter(|p| matches!(p, Part::Operator(..))).count(), 24);
        assert_eq!(
            format.0[3],
            Part::Operator(Operator::Header(Side::Request, HeaderKey::Method, None), None)
        );
    }

    #[test]
    fn arguments_lengths_and_escapes() {
        assert_eq!(Format::parse("100%%").unwrap().constant(), Some("100%"));
        assert_eq!(
            &*Format::parse("%REQ(X-A?X-B):10%").unwrap().0,
            [Part::Operator(
                Operator::Header(
                    Side::Request,
                    HeaderKey::Name(HeaderName::from_static("x-a")),
                    Some(HeaderKey::Name(HeaderName::from_static("x-b")))
                ),
                Some(10)
            )]
        );
        assert_eq!(
            &*Format::parse("%START_TIME(%Y-%m)%").unwrap().0,
            [Part::Operator(Operator::StartTime(Some("%Y-%m".into())), None)]
        );
        let metadata = Format::parse("%DYNAMIC_METADATA(a.b:c:d)%").unwrap();
        assert!(matches!(&metadata.0[0], Part::Operator(Operator::Metadata(_, f, keys), None)
            if &**f == "a.b" && keys.len() == 2));
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for text in
            ["%", "%NOT_THERE%", "%REQ(a b)%", "%RESP(:status)%", "%REQ(x):y%", "%REQ(x%", "%GRPC_STATUS(x)%"]
        {
            assert!(Format::parse(text).is_err(), "{text}");
        }
    }
}
