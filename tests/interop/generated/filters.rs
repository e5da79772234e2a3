//! What routes say to filters, from a seed. Pure.

use serde_json::{Value, json};

use super::dice::Dice;

/// Where pages of other origins may ask.
pub(crate) fn cors(dice: &mut Dice) -> Value {
    let origins = [
        json!({"exact": "https://good.example"}),
        json!({"safe_regex": {"regex": "https://.*\\.fine\\.example"}}),
        json!({"prefix": "https://a"}),
        json!({"suffix": ".EXAMPLE", "ignore_case": true}),
        json!({"exact": "*"}),
    ];
    let origins: Vec<&Value> = (0..dice.from(0..3)).map(|_| dice.pick(&origins)).collect();
    let mut policy = json!({
        "@type": "type.googleapis.com/envoy.extensions.filters.http.cors.v3.CorsPolicy",
        "allow_origin_string_match": origins,
    });
    for (field, value) in [
        ("allow_methods", "GET, PUT"),
        ("allow_headers", "x-a,x-b"),
        ("expose_headers", "x-c"),
        ("max_age", "3600"),
    ] {
        if dice.one_in(2) {
            policy[field] = json!(value);
        }
    }
    let switches = ["allow_credentials", "allow_private_network_access", "forward_not_matching_preflights"];
    for field in switches {
        if dice.one_in(3) {
            policy[field] = json!(dice.one_in(2));
        }
    }
    json!({"envoy.filters.http.cors": policy})
}

/// All requests meet it, or none.
pub(crate) fn fault(dice: &mut Dice) -> Value {
    let mut fault = json!({"@type": "type.googleapis.com/envoy.extensions.filters.http.fault.v3.HTTPFault"});
    let all = |dice: &mut Dice| json!({"numerator": if dice.one_in(3) { 0 } else { 100 }});
    if dice.one_in(2) {
        fault["delay"] = json!({"fixed_delay": "0.005s", "percentage": all(dice)});
    }
    match dice.from(0..3) {
        0 => fault["abort"] = json!({"http_status": dice.pick(&[418, 503]), "percentage": all(dice)}),
        1 => fault["abort"] = json!({"grpc_status": dice.pick(&[3, 14]), "percentage": all(dice)}),
        _ => {}
    }
    if dice.one_in(3) {
        fault["headers"] = json!([{"name": "x-a", "present_match": true}]);
    }
    fault
}
