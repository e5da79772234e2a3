//! What routes do with requests, from a seed. Pure.

use serde_json::{Value, json};

use super::dice::Dice;
use super::scenario::{COPIES, Hint, SERVED, SILENT, flags, operations};

/// One of the three kinds, and what belongs to it.
pub(crate) fn action(dice: &mut Dice, hint: &mut Hint) -> (&'static str, Value) {
    match dice.from(0..10) {
        0..=1 => ("redirect", redirect(dice)),
        2 => ("direct_response", direct(dice)),
        _ => ("route", forward(dice, hint)),
    }
}

/// Rewrites by expression: what is found, and what comes in its place.
fn substitution(dice: &mut Dice) -> Value {
    let (pattern, substitution) = *dice.pick(&[
        ("^/([^/]*)/(.*)$", "/\\2/\\1"),
        ("a", "b"),
        ("/+", "/x/"),
        ("^", "/new"),
        ("b+", "-"),
        ("[a-z]+$", "\\0\\0"),
        ("(v)([0-9])", "\\1\\\\\\2$1"),
        ("none", "never"),
    ]);
    json!({"pattern": {"regex": pattern}, "substitution": substitution})
}

fn redirect(dice: &mut Dice) -> Value {
    let mut redirect = json!({});
    let codes = ["MOVED_PERMANENTLY", "FOUND", "SEE_OTHER", "TEMPORARY_REDIRECT", "PERMANENT_REDIRECT"];
    if !dice.one_in(4) {
        redirect["response_code"] = json!(dice.pick(&codes));
    }
    if dice.one_in(3) {
        redirect["host_redirect"] = json!(dice.pick(&["new.example", "new.example:8443", "[::1]"]));
    }
    if dice.one_in(3) {
        redirect["port_redirect"] = json!(dice.pick(&[80, 443, 8080]));
    }
    match dice.from(0..6) {
        0 => redirect["https_redirect"] = json!(true),
        1 => redirect["scheme_redirect"] = json!(dice.pick(&["https", "http", "HTTPS"])),
        _ => {}
    }
    match dice.from(0..6) {
        0 => redirect["path_redirect"] = json!(dice.pick(&["/else", "/else?x=y", "else", "/else#part"])),
        1..=2 => redirect["prefix_rewrite"] = json!(dice.pick(&["/", "/else", "/else/", "/e?x"])),
        3 => redirect["regex_rewrite"] = substitution(dice),
        _ => {}
    }
    flags(dice, &mut redirect, &["strip_query"], 3);
    redirect
}

fn direct(dice: &mut Dice) -> Value {
    let mut direct = json!({"status": dice.pick(&[200, 204, 299, 304, 403, 418, 503, 599])});
    if !dice.one_in(3) {
        direct["body"] = json!({"inline_string": dice.pick(&["short and stout", "{}", "100 %", "a\nb\n"])});
    }
    direct
}

fn forward(dice: &mut Dice, hint: &mut Hint) -> Value {
    let mut forward = match dice.from(0..12) {
        0 => {
            hint.headers.push(("x-cluster".to_owned(), (*dice.pick(&["two", "nowhere", ""])).to_owned()));
            json!({"cluster_header": "x-cluster"})
        }
        1 => json!({"cluster": dice.pick(&["nowhere", "empty", "closed", SILENT])}),
        2..=3 => json!({"weighted_clusters": weighted(dice)}),
        _ => json!({"cluster": dice.pick(&SERVED)}),
    };
    match dice.from(0..7) {
        0..=1 => {
            forward["prefix_rewrite"] = json!(dice.pick(&["/", "/new", "/new/", "/n%20w"]));
        }
        2 => forward["regex_rewrite"] = substitution(dice),
        _ => {}
    }
    match dice.from(0..12) {
        0..=1 => forward["host_rewrite_literal"] = json!(dice.pick(&["new.example", "New.Example:81"])),
        2 => {
            hint.headers.push(("x-host".to_owned(), "from-header.example".to_owned()));
            forward["host_rewrite_header"] = json!("x-host");
        }
        3 => {
            let rewrite = json!({"pattern": {"regex": "^/([a-z]+).*$"}, "substitution": "\\1.example"});
            forward["host_rewrite_path_regex"] = rewrite;
        }
        _ => {}
    }
    flags(dice, &mut forward, &["append_x_forwarded_host"], 4);
    if dice.one_in(6) {
        forward["cluster_not_found_response_code"] =
            json!(dice.pick(&["NOT_FOUND", "INTERNAL_SERVER_ERROR"]));
    }
    if dice.one_in(4) {
        forward["timeout"] = json!(dice.pick(&["0s", "10s", "20s"]));
    }
    if dice.one_in(4) {
        forward["retry_policy"] = retries(dice);
    }
    if dice.one_in(8) {
        let mut copy = json!({"cluster": COPIES});
        flags(dice, &mut copy, &["disable_shadow_host_suffix_append"], 3);
        if dice.one_in(4) {
            copy["runtime_fraction"] = json!({"default_value": {"numerator": 0}});
        }
        forward["request_mirror_policies"] = json!([copy]);
    }
    if forward["cluster"] == json!(SILENT) {
        forward["timeout"] = json!("0.03s");
        if let Some(policy) = forward.get_mut("retry_policy") {
            // either passes long before the other
            let (whole, each) = *dice.pick(&[("0.03s", "5s"), ("5s", "0.01s")]);
            policy["per_try_timeout"] = json!(each);
            forward["timeout"] = json!(whole);
        }
    }
    forward
}

/// All weight is one cluster's, so that chance has no say.
fn weighted(dice: &mut Dice) -> Value {
    let all = dice.from(0..SERVED.len());
    let clusters: Vec<Value> = SERVED
        .iter()
        .enumerate()
        .map(|(at, name)| {
            let mut cluster = json!({"name": name, "weight": if at == all { 7 } else { 0 }});
            operations(dice, &mut cluster, 3);
            if dice.one_in(4) {
                cluster["host_rewrite_literal"] = json!("weighted.example");
            }
            cluster
        })
        .collect();
    json!({"clusters": clusters})
}

/// When an attempt is followed by another.
pub(crate) fn retries(dice: &mut Dice) -> Value {
    let conditions = [
        "5xx",
        "gateway-error",
        "retriable-4xx",
        "retriable-status-codes",
        "reset,connect-failure",
        "retriable-headers",
        "5xx,retriable-4xx",
        "",
    ];
    let mut policy = json!({
        "retry_on": dice.pick(&conditions),
        "num_retries": dice.from(0..4),
        "retry_back_off": {"base_interval": "0.001s", "max_interval": "0.002s"},
    });
    if dice.one_in(2) {
        policy["retriable_status_codes"] = json!([404, 500]);
    }
    if dice.one_in(3) {
        policy["retriable_headers"] = json!([{"name": "x-again"}]);
    }
    if dice.one_in(5) {
        policy["retriable_request_headers"] = json!([{"name": "x-a"}]);
    }
    policy
}
