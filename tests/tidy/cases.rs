//! Attacks on the handling of requests, by class of published vulnerabilities, and the tests that make them. Numbers are
//! those of the catalogue that this project was given; what is not offered at all says so in place of tests.

use std::fs;

use crate::files;

struct Case {
    number: u8,
    attack: &'static str,
    tests: &'static [&'static str],
    /// Why there is no test.
    absent: &'static str,
}

const fn case(number: u8, attack: &'static str, tests: &'static [&'static str]) -> Case {
    Case { number, attack, tests, absent: "" }
}

const fn absent(number: u8, attack: &'static str, absent: &'static str) -> Case {
    Case { number, attack, tests: &[], absent }
}

const CASES: [Case; 37] = [
    case(
        1,
        "CVE-2021-31920: other spellings of a denied path",
        &[
            "no_spelling_of_a_denied_path_comes_through",
            "base_resolves_dots_and_unreserved_escapes",
            "decode_and_merge_leaves_no_second_spelling",
        ],
    ),
    case(2, "CVE-2021-39156: a fragment", &["no_spelling_of_a_denied_path_comes_through"]),
    case(
        3,
        "CVE-2021-39155: a host in capitals",
        &["no_spelling_of_a_denied_host_comes_through", "hosts_match_with_any_port_unless_one_is_given"],
    ),
    case(
        4,
        "ISTIO-SECURITY-2021-008: a host with a port",
        &["no_spelling_of_a_denied_host_comes_through", "hosts_match_with_any_port_unless_one_is_given"],
    ),
    case(
        5,
        "a dot behind a host, in HTTP and in TLS",
        &[
            "no_spelling_of_a_denied_host_comes_through",
            "every_spelling_of_a_host_finds_its_route_and_is_sent_on_in_one_form",
            "a_client_hello_tells_name_and_protocols",
        ],
    ),
    case(6, "CVE-2020-8595: a query behind an exact path", &["the_query_is_no_part_of_the_path"]),
    case(7, "CVE-2023-27487: a forged x-envoy-original-path", &["clients_cannot_steer_the_proxy"]),
    case(8, "CVE-2024-45806: internal headers from private addresses", &["clients_cannot_steer_the_proxy"]),
    case(
        9,
        "CVE-2024-10005 and 10006: paths and headers in other forms",
        &[
            "no_spelling_of_a_denied_path_comes_through",
            "each_value_of_a_header_is_looked_at_and_addresses_that_are_none_harm_nobody",
        ],
    ),
    case(
        10,
        "CVE-2021-36213: a denial that ends as leave",
        &["allow_needs_a_match_and_deny_a_miss", "one_value_that_cannot_be_read_makes_the_field_unreadable"],
    ),
    absent(
        11,
        "CVE-2022-21679: rules that an older proxy does not understand",
        "there is no older release; policies are written in forms that every Envoy of its list of versions has",
    ),
    case(
        12,
        "CVE-2026-26308: values of a header that are joined",
        &[
            "every_value_of_a_header_counts",
            "each_value_of_a_header_is_looked_at_and_addresses_that_are_none_harm_nobody",
        ],
    ),
    absent(
        13,
        "CVE-2021-32777: an authorizer that sees one value",
        "there is no external authorizer; a policy that names one denies",
    ),
    case(
        14,
        "CVE-2026-39350: dots of a name as wildcards",
        &[
            "no_spelling_of_a_denied_host_comes_through",
            "templates_become_expressions_with_everything_else_quoted",
        ],
    ),
    case(15, "ISTIO-SECURITY-2021-004: no identity", &["a_missing_identity_satisfies_no_rule"]),
    case(
        16,
        "CVE-2023-3518: a token without the identity, and the reverse",
        &["claims_of_a_good_token_decide_and_the_token_stays_here", "every_token_of_a_request_must_be_good"],
    ),
    absent(17, "CVE-2021-31921: any service by its SNI", "there is no gateway that passes connections on"),
    case(
        18,
        "CVE-2019-18802: white space behind a value",
        &["no_spelling_of_a_denied_host_comes_through", "white_space_around_a_value_is_no_part_of_it"],
    ),
    case(19, "CVE-2019-9900: a null in a header", &["heads_are_made_of_lines"]),
    case(20, "CVE-2019-18838: no host", &["heads_are_made_of_lines", "malformed_requests_are_refused"]),
    case(
        21,
        "CVE-2023-27491: names and values of HTTP/2 that HTTP/1 does not have",
        &["malformed_requests_end_their_stream_and_reach_no_server"],
    ),
    case(
        22,
        "CVE-2024-23326: bytes ahead of another protocol",
        &[
            "what_is_sent_ahead_of_another_protocol_is_no_request",
            "what_a_server_sends_ahead_is_no_answer_to_the_next_request",
        ],
    ),
    case(
        23,
        "lengths, encodings, chunks and folded lines",
        &[
            "lengths_that_contradict_each_other_are_refused",
            "only_chunked_is_an_encoding",
            "chunks_are_read_as_they_are_written",
            "heads_are_made_of_lines",
            "an_answer_with_two_meanings_is_no_answer",
        ],
    ),
    case(24, "CVE-2026-47692: a TLV longer than its header", &["a_tlv_longer_than_the_header_is_refused"]),
    case(
        25,
        "CVE-2026-48743: a length that the body does not have",
        &["bodies_that_are_not_as_long_as_they_say_end_their_stream"],
    ),
    case(42, "CVE-2023-44487: rapid resets", &["requests_that_are_given_up_at_once_close_the_connection"]),
    case(
        43,
        "CVE-2024-27919: continuations without an end",
        &["each_kind_of_flood_closes_its_connection_and_no_other"],
    ),
    case(
        44,
        "CVE-2019-9511 and its family: floods of frames",
        &[
            "each_kind_of_flood_closes_its_connection_and_no_other",
            "each_kind_of_flood_is_told_and_what_clients_do_is_not",
        ],
    ),
    case(
        45,
        "CVE-2026-47774: heads that grow when they are decompressed",
        &["a_field_of_the_table_is_counted_each_time_it_is_used"],
    ),
    absent(46, "blocked decoding of QPACK", "HTTP/3 is not offered"),
    absent(
        47,
        "bombs of zstd and brotli",
        "no body is decompressed or held back; JSON has serde's limit of depth",
    ),
    case(
        48,
        "CVE-2020-7219: bodies and calls without a limit",
        &[
            "a_body_that_is_too_large_is_refused_before_it_is_read",
            "garbage_on_any_port_ends_its_own_connection_only",
        ],
    ),
    case(49, "labels of metrics that a client chooses", &["label_sets_are_bounded"]),
    case(
        50,
        "CVE-2024-40632: an admin port that any page reaches",
        &["switches_are_refused_to_pages_and_to_other_methods_than_post"],
    ),
    case(
        51,
        "CVE-2021-32780: a server that takes no streams and goes away",
        &["a_server_that_takes_no_stream_and_goes_away_is_told_as_unavailable"],
    ),
    case(
        52,
        "CVE-2024-53270: errors in the middle of a request; addresses with a scope",
        &[
            "each_value_of_a_header_is_looked_at_and_addresses_that_are_none_harm_nobody",
            "a_client_that_left_ends_its_request_to_the_server",
        ],
    ),
    case(53, "CVE-2021-38698: a way past the roles", &["every_route_asks_every_caller_for_its_role"]),
];

#[test]
fn every_attack_on_requests_names_the_tests_that_make_it() {
    let numbers: Vec<u8> = CASES.iter().map(|case| case.number).collect();
    assert_eq!(numbers, (1..=25).chain(42..=53).collect::<Vec<u8>>());
    let sources: Vec<String> = files("rs").iter().filter_map(|path| fs::read_to_string(path).ok()).collect();
    for Case { number, attack, tests, absent } in &CASES {
        assert!(tests.is_empty() != absent.is_empty(), "{number}, {attack}: tests, or why there is none");
        for test in *tests {
            let definition = format!("fn {test}(");
            assert!(
                sources.iter().any(|s| s.contains(&definition)),
                "{number}, {attack}: `{test}` is no test"
            );
        }
    }
}
