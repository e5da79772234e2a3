//! Where access log lines go, what they say, and which requests get one.

use std::path::PathBuf;

use envoy_types::pb::envoy::config::accesslog::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::access_loggers::file::v3 as file;
use envoy_types::pb::envoy::extensions::access_loggers::stream::v3 as stream;

use super::decode::{Fraction, Invalid, Under as _, data_source, fraction, is, json, unpack};
use super::format::{Format, JsonFormat};
use super::matcher::HeaderMatcher;

/// Envoy's own line, for a log without a format.
pub const DEFAULT_LINE: &str = "[%START_TIME%] \"%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %PROTOCOL%\" \
%RESPONSE_CODE% %RESPONSE_FLAGS% %BYTES_RECEIVED% %BYTES_SENT% %DURATION% \
%RESP(X-ENVOY-UPSTREAM-SERVICE-TIME)% \"%REQ(X-FORWARDED-FOR)%\" \"%REQ(USER-AGENT)%\" \"%REQ(X-REQUEST-ID)%\" \
\"%REQ(:AUTHORITY)%\" \"%UPSTREAM_HOST%\"\n";

/// One access log.
#[derive(Debug, Clone)]
pub struct AccessLog {
    /// Where lines go.
    pub sink: Sink,
    /// What they say.
    pub format: LineFormat,
    /// Leave out fields without a value from JSON, and write nothing instead of `-` in text.
    pub omit_empty: bool,
    /// Which requests are logged; `None`: all.
    pub filter: Option<Filter>,
}

/// Where lines go.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Sink {
    /// Appended to a file.
    File(PathBuf),
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What a line says.
#[derive(Debug, Clone)]
pub enum LineFormat {
    /// Text; brings its own line end.
    Text(Format),
    /// One JSON object per line.
    Json(JsonFormat),
}

/// How a number is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Comparison {
    /// Equal.
    Eq,
    /// Greater or equal.
    Ge,
    /// Less or equal.
    Le,
    /// Not equal.
    Ne,
}

impl Comparison {
    /// Whether `left` stands to `right` like this.
    #[must_use]
    pub fn holds(self, left: u64, right: u64) -> bool {
        match self {
            Self::Eq => left == right,
            Self::Ge => left >= right,
            Self::Le => left <= right,
            Self::Ne => left != right,
        }
    }
}

/// Which requests are logged.
#[derive(Debug, Clone)]
pub enum Filter {
    /// The response's status.
    Status(Comparison, u32),
    /// The duration in milliseconds.
    Duration(Comparison, u32),
    /// All but health checks (this proxy answers none itself, so all).
    NotHealthCheck,
    /// A share.
    Share(Fraction),
    /// A request header.
    Header(HeaderMatcher),
    /// One of these response flags, or, for an empty list, any flag.
    ResponseFlags(Box<[Box<str>]>),
    /// One of these gRPC statuses, or (`true`) none of them.
    GrpcStatus(Box<[i32]>, bool),
    /// All of these.
    And(Box<[Filter]>),
    /// One of these.
    Or(Box<[Filter]>),
}

impl AccessLog {
    /// From its proto.
    ///
    /// # Errors
    ///
    /// A kind of log other than file, stdout and stderr; an unknown operator or filter.
    pub fn new(pb: pb::AccessLog) -> Result<Self, Invalid> {
        let Some(pb::access_log::ConfigType::TypedConfig(any)) = pb.config_type else {
            return Err(Invalid::missing("typed_config"));
        };
        let (sink, (format, omit_empty)) = if is::<file::FileAccessLog>(&any) {
            let log: file::FileAccessLog = unpack(&any).under("typed_config")?;
            (sink(&log.path)?, file_format(log.access_log_format).under("typed_config")?)
        } else if is::<stream::StdoutAccessLog>(&any) {
            use stream::stdout_access_log::AccessLogFormat::LogFormat;
            let log: stream::StdoutAccessLog = unpack(&any).under("typed_config")?;
            let format = log.access_log_format.map(|LogFormat(f)| f);
            (Sink::Stdout, substitution(format).under("typed_config")?)
        } else if is::<stream::StderrAccessLog>(&any) {
            use stream::stderr_access_log::AccessLogFormat::LogFormat;
            let log: stream::StderrAccessLog = unpack(&any).under("typed_config")?;
            let format = log.access_log_format.map(|LogFormat(f)| f);
            (Sink::Stderr, substitution(format).under("typed_config")?)
        } else {
            return Err(Invalid::new(
                "typed_config",
                format!("`{}` is not a log this proxy writes", any.type_url),
            ));
        };
        let filter = pb.filter.map(|f| Filter::new(f, 8)).transpose().under("filter")?;
        Ok(Self { sink, format, omit_empty, filter })
    }
}

/// Several access logs.
///
/// # Errors
///
/// As [`AccessLog::new`].
pub fn access_logs(pb: Vec<pb::AccessLog>) -> Result<Box<[AccessLog]>, Invalid> {
    pb.into_iter().enumerate().map(|(i, l)| AccessLog::new(l).at("access_log", i)).collect()
}

fn sink(path: &str) -> Result<Sink, Invalid> {
    match path {
        "" => Err(Invalid::missing("typed_config.path")),
        "/dev/stdout" => Ok(Sink::Stdout),
        "/dev/stderr" => Ok(Sink::Stderr),
        path => Ok(Sink::File(path.into())),
    }
}

fn default_line() -> Result<(LineFormat, bool), Invalid> {
    Ok((LineFormat::Text(Format::parse(DEFAULT_LINE)?), false))
}

fn file_format(pb: Option<file::file_access_log::AccessLogFormat>) -> Result<(LineFormat, bool), Invalid> {
    use file::file_access_log::AccessLogFormat as Pb;
    #[expect(deprecated, reason = "configuration files still use the older forms")]
    match pb {
        None => default_line(),
        Some(Pb::LogFormat(f)) => substitution(Some(f)).under("log_format"),
        Some(Pb::Format(text)) if text.is_empty() => default_line(),
        Some(Pb::Format(text)) => Ok((LineFormat::Text(Format::parse(&text).under("format")?), false)),
        Some(Pb::JsonFormat(s) | Pb::TypedJsonFormat(s)) => {
            let format = JsonFormat::new(&serde_json::Value::Object(json(s))).under("json_format")?;
            Ok((LineFormat::Json(format), false))
        }
    }
}

fn substitution(pb: Option<core::SubstitutionFormatString>) -> Result<(LineFormat, bool), Invalid> {
    use core::substitution_format_string::Format as Pb;
    let Some(pb) = pb else { return default_line() };
    if !pb.formatters.is_empty() {
        return Err(Invalid::unsupported("formatters"));
    }
    let format = match pb.format {
        None => return Err(Invalid::missing("format")),
        #[expect(deprecated, reason = "configuration files still use it")]
        Some(Pb::TextFormat(text)) => LineFormat::Text(Format::parse(&text).under("text_format")?),
        Some(Pb::TextFormatSource(source)) => {
            let bytes = data_source(source).under("text_format_source")?;
            let text =
                String::from_utf8(bytes).map_err(|_| Invalid::new("text_format_source", "is not UTF-8"))?;
            LineFormat::Text(Format::parse(&text).under("text_format_source")?)
        }
        Some(Pb::JsonFormat(s)) => {
            LineFormat::Json(JsonFormat::new(&serde_json::Value::Object(json(s))).under("json_format")?)
        }
    };
    Ok((format, pb.omit_empty_values))
}

impl Filter {
    fn new(pb: pb::AccessLogFilter, depth: u8) -> Result<Self, Invalid> {
        use pb::access_log_filter::FilterSpecifier as Pb;
        let Some(depth) = depth.checked_sub(1) else { return Err(Invalid::new("", "nested too deep")) };
        let all = |filters: Vec<pb::AccessLogFilter>| {
            filters.into_iter().map(|f| Self::new(f, depth)).collect::<Result<Box<[_]>, _>>()
        };
        Ok(match pb.filter_specifier {
            None => return Err(Invalid::missing("filter_specifier")),
            Some(Pb::StatusCodeFilter(f)) => comparison(f.comparison).map(|(op, n)| Self::Status(op, n))?,
            Some(Pb::DurationFilter(f)) => comparison(f.comparison).map(|(op, n)| Self::Duration(op, n))?,
            Some(Pb::NotHealthCheckFilter(_)) => Self::NotHealthCheck,
            Some(Pb::RuntimeFilter(f)) => {
                Self::Share(f.percent_sampled.map_or(Ok(Fraction::NONE), fraction).under("percent_sampled")?)
            }
            Some(Pb::HeaderFilter(f)) => {
                let header = f.header.ok_or_else(|| Invalid::missing("header"))?;
                Self::Header(HeaderMatcher::new(header).under("header")?)
            }
            Some(Pb::ResponseFlagFilter(f)) => {
                Self::ResponseFlags(f.flags.into_iter().map(Into::into).collect())
            }
            Some(Pb::GrpcStatusFilter(f)) => Self::GrpcStatus(f.statuses.into(), f.exclude),
            Some(Pb::AndFilter(f)) => Self::And(all(f.filters)?),
            Some(Pb::OrFilter(f)) => Self::Or(all(f.filters)?),
            Some(
                Pb::TraceableFilter(_)
                | Pb::ExtensionFilter(_)
                | Pb::MetadataFilter(_)
                | Pb::LogTypeFilter(_),
            ) => return Err(Invalid::unsupported("filter_specifier")),
        })
    }
}

fn comparison(pb: Option<pb::ComparisonFilter>) -> Result<(Comparison, u32), Invalid> {
    let pb = pb.ok_or_else(|| Invalid::missing("comparison"))?;
    let op = match pb.op {
        0 => Comparison::Eq,
        1 => Comparison::Ge,
        2 => Comparison::Le,
        3 => Comparison::Ne,
        other => return Err(Invalid::new("comparison.op", format!("unknown value {other}"))),
    };
    let value = pb.value.ok_or_else(|| Invalid::missing("comparison.value"))?;
    Ok((op, value.default_value))
}
