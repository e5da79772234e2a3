//! Rules of `Telemetry`.

use super::Checker;
use crate::model::security::ExtensionProviderName;
use crate::model::telemetry::{
    AccessLogging, CustomTag, CustomTagType, MetricMatch, Metrics, MetricsOverrides, TagOverrideOperation,
    Telemetry, Tracing,
};

pub(super) fn check(cx: &mut Checker, namespace: &str, telemetry: &Telemetry) {
    cx.targets(namespace, telemetry.selector.as_ref(), telemetry.target_ref.as_ref(), &telemetry.target_refs);
    if telemetry.tracing.len() > 1 {
        cx.at("tracing", |cx| {
            cx.warn("several entries: of those with the same match only the first has an effect")
        });
    }
    cx.each("tracing", &telemetry.tracing, check_tracing);
    cx.each("metrics", &telemetry.metrics, check_metrics);
    cx.each("accessLogging", &telemetry.access_logging, check_access_logging);
}

fn check_providers(cx: &mut Checker, providers: &[ExtensionProviderName]) {
    cx.each("providers", providers, |cx, provider| {
        cx.required("name", &provider.name);
    });
    cx.unique("providers", providers.iter().map(|provider| provider.name.as_str()), "provider");
}

fn check_tracing(cx: &mut Checker, tracing: &Tracing) {
    check_providers(cx, &tracing.providers);
    if tracing.providers.len() > 1 {
        cx.error_at("providers", "must have one entry at most: a proxy sends spans to one place");
    }
    cx.percent("randomSamplingPercentage", tracing.random_sampling_percentage);
    cx.entries("customTags", &tracing.custom_tags, check_tag);
}

fn check_tag(cx: &mut Checker, name: &str, tag: &CustomTag) {
    if name.is_empty() {
        cx.error("the name of a tag must not be empty");
    }
    match &tag.r#type {
        None => cx.error("must have one of literal, environment, header and formatter"),
        Some(CustomTagType::Literal(literal)) => cx.at("literal", |cx| {
            cx.required("value", &literal.value);
        }),
        Some(CustomTagType::Formatter(formatter)) => cx.at("formatter", |cx| {
            cx.required("value", &formatter.value);
        }),
        Some(CustomTagType::Environment(environment)) => cx.at("environment", |cx| {
            cx.required("name", &environment.name);
        }),
        Some(CustomTagType::Header(header)) => cx.at("header", |cx| {
            cx.required("name", &header.name);
        }),
    }
}

fn check_metrics(cx: &mut Checker, metrics: &Metrics) {
    check_providers(cx, &metrics.providers);
    cx.duration("reportingInterval", metrics.reporting_interval);
    cx.each("overrides", &metrics.overrides, check_overrides);
}

fn check_overrides(cx: &mut Checker, overrides: &MetricsOverrides) {
    cx.opt("match", overrides.r#match.as_ref(), |cx, selector| {
        if let Some(MetricMatch::CustomMetric(name)) = &selector.metric_match {
            cx.required("customMetric", name);
        }
    });
    cx.entries("tagOverrides", &overrides.tag_overrides, |cx, name, tag| {
        if name.is_empty() {
            cx.error("the name of a label must not be empty");
        }
        match tag.operation {
            TagOverrideOperation::Upsert => {
                cx.refuse(tag.value.is_empty(), "value", "is required with operation UPSERT");
            }
            TagOverrideOperation::Remove => {
                cx.refuse(!tag.value.is_empty(), "value", "must be empty with operation REMOVE");
            }
        }
    });
}

fn check_access_logging(cx: &mut Checker, logging: &AccessLogging) {
    check_providers(cx, &logging.providers);
    cx.opt("filter", logging.filter.as_ref(), |cx, filter| {
        if cx.required("expression", &filter.expression) && !balanced(&filter.expression) {
            cx.error_at("expression", "must be a CEL expression; a bracket or a quote is not closed");
        }
    });
}

/// Are brackets and quotes of an expression closed? The proxy judges the rest.
fn balanced(expression: &str) -> bool {
    let mut open = Vec::new();
    let mut quote = None;
    let mut escaped = false;
    for c in expression.chars() {
        match (quote, c) {
            _ if escaped => escaped = false,
            (Some(_), '\\') => escaped = true,
            (Some(q), c) if c == q => quote = None,
            (Some(_), _) => {}
            (None, '\'' | '"') => quote = Some(c),
            (None, '(') => open.push(')'),
            (None, '[') => open.push(']'),
            (None, '{') => open.push('}'),
            (None, ')' | ']' | '}') => {
                if open.pop() != Some(c) {
                    return false;
                }
            }
            (None, _) => {}
        }
    }
    open.is_empty() && quote.is_none()
}
