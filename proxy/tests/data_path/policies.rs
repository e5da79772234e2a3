//! One path and one host for policies, routes and the server: no spelling of what is denied comes through.

use crate::backend::Backend;
use crate::h2spec::{Client, END_HEADERS, END_STREAM, HEADERS, Said, frame, with};
use crate::harness::{Running, bootstrap, cluster, raw};

/// How Istio normalises most: `DECODE_AND_MERGE_SLASHES`.
const STRICT: &str = "          normalize_path: true\n          merge_slashes: true\n          \
                      path_with_escaped_slashes_action: UNESCAPE_AND_FORWARD";

/// Spellings of `/admin` and of what is below it.
const ADMIN: [&str; 25] = [
    "/admin",
    "//admin",
    "///admin",
    "/./admin",
    "/.//admin",
    "/x/../admin",
    "/x/y/../../admin",
    "/../admin",
    "/%61dmin",
    "/%61%64%6D%69%6e",
    "/%2e/admin",
    "/x/%2E%2e/admin",
    "/%2fadmin",
    "/x%2f..%2fadmin",
    "/x%5c..%5Cadmin",
    "/x\\..\\admin",
    "/\\admin",
    "/admin%2f",
    "/admin\\",
    "/admin;x",
    "/admin/..;/admin",
    "/.;/admin",
    "/x/..;a=b/admin",
    "/admin?x=/public",
    "/admin#/public",
];

fn rules(rules: &str) -> String {
    format!(
        "          http_filters:\n          - name: envoy.filters.http.rbac\n            typed_config:\n              \
         \"@type\": type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC\n              rules: {rules}\n"
    )
}

async fn guarded(backend: &Backend, policy: &str) -> Running {
    let route = "              - {match: {prefix: \"/\"}, route: {cluster: up}}";
    let text = bootstrap(route, STRICT, &cluster("up", &[backend.address], ""));
    Running::start(&text.replace("          http_filters:\n", &rules(policy))).await
}

/// The status of a request over HTTP/2; 0 when its stream or connection ended.
async fn over_h2(proxy: &Running, path: &str, host: &str) -> u16 {
    let mut client = Client::open(proxy.address(), &[]).await;
    let head =
        with(Vec::new(), &[(":method", "GET"), (":scheme", "http"), (":path", path), (":authority", host)]);
    client.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &head)).await;
    loop {
        let said = client.said().await;
        if let Said::Head(1, status) = said {
            return status;
        }
        if matches!(said, Said::Reset(..) | Said::GoAway(_) | Said::Closed) {
            return 0;
        }
        assert_ne!(said, Said::Silent, "{path} of {host}");
    }
}

async fn over_h1(proxy: &Running, path: &str, host: &str) -> String {
    let request = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nx-a: 1\r\nconnection: close\r\n\r\n");
    let answer = raw(proxy.address(), &request).await;
    answer.get(9..12).unwrap_or("cut").to_owned()
}

#[tokio::test]
async fn no_spelling_of_a_denied_path_comes_through() {
    let backend = Backend::start("a").await;
    let admin = "url_path: {path: {prefix: /admin}}";
    let deny = format!(
        "{{action: DENY, policies: {{p: {{permissions: [{{{admin}}}], principals: [{{any: true}}]}}}}}}"
    );
    let allow = format!(
        "{{policies: {{p: {{permissions: [{{not_rule: {{{admin}}}}}], principals: [{{any: true}}]}}}}}}"
    );
    for policy in [deny, allow] {
        let proxy = guarded(&backend, &policy).await;
        let before = backend.hits();
        for path in ADMIN {
            for uri in [path.to_owned(), format!("http://a{path}")] {
                let status = over_h1(&proxy, &uri, "a").await;
                assert!(matches!(&*status, "403" | "400" | "cut"), "{uri}: {status}");
            }
            assert_ne!(over_h2(&proxy, path, "a").await, 200, "{path}");
        }
        assert_eq!(backend.hits(), before, "a denied request came through");
        // what is another path is served
        for path in ["/", "/public", "/ADMIN", "/public?x=/admin", "/admi", "/%2561dmin"] {
            assert_eq!(over_h1(&proxy, path, "a").await, "200", "{path}");
            assert_eq!(over_h2(&proxy, path, "a").await, 200, "{path}");
        }
        proxy.end().await;
    }
}

#[tokio::test]
async fn no_spelling_of_a_denied_host_comes_through() {
    let backend = Backend::start("a").await;
    // as `translate` writes `hosts: [secret.com]`
    let host =
        r#"header: {name: ":authority", string_match: {safe_regex: {regex: "(?i)secret\\.com(:[0-9]+)?"}}}"#;
    let deny = format!(
        "{{action: DENY, policies: {{p: {{permissions: [{{{host}}}], principals: [{{any: true}}]}}}}}}"
    );
    let proxy = guarded(&backend, &deny).await;
    for host in [
        "secret.com",
        "Secret.com",
        "SECRET.COM",
        "secret.com:80",
        "Secret.Com:8080",
        "secret.com.",
        "secret.com.:80",
        "secret.com..",
        "secret.com:",
        "secret.com ",
        "\tsecret.com",
        "u@secret.com",
        "secret.com#",
        "secret.com?",
        "secret.com/",
    ] {
        let status = over_h1(&proxy, "/", host).await;
        assert!(matches!(&*status, "403" | "400" | "cut"), "{host}: {status}");
        // an absolute URI outranks the header
        let status = over_h1(&proxy, &format!("http://{}/", host.trim()), "other.com").await;
        assert_ne!(status, "200", "{host}, as a URI");
        assert_ne!(over_h2(&proxy, "/", host).await, 200, "{host}");
    }
    assert_eq!(backend.hits(), 0, "a denied request came through");
    assert_eq!(over_h1(&proxy, "/", "secretxcom").await, "200");
    proxy.end().await;
}

#[tokio::test]
async fn each_value_of_a_header_is_looked_at_and_addresses_that_are_none_harm_nobody() {
    let backend = Backend::start("a").await;
    let header = "header: {name: x-role, string_match: {exact: guest}}";
    let deny = format!(
        "{{action: DENY, policies: {{p: {{permissions: [{{{header}}}], principals: [{{any: true}}]}}}}}}"
    );
    let proxy = guarded(&backend, &deny).await;
    let ask = async |lines: &str| {
        let request = format!("GET / HTTP/1.1\r\nhost: a\r\n{lines}\r\nconnection: close\r\n\r\n");
        raw(proxy.address(), &request).await.get(9..12).unwrap_or("cut").to_owned()
    };
    for lines in ["x-role: guest", "x-role: admin\r\nx-role: guest", "x-role: guest\r\nx-role: admin"] {
        assert_eq!(ask(lines).await, "403", "{lines}");
    }
    assert_eq!(backend.hits(), 0);
    for address in
        ["fe80::1%eth0", "[fe80::1%25eth0]:80", "1.2.3.4.5", ",,,", "\u{e9}", "::ffff:1.2.3.4", "unknown"]
    {
        assert_eq!(ask(&format!("x-forwarded-for: {address}")).await, "200", "{address}");
    }
    proxy.end().await;
}

#[tokio::test]
async fn switches_are_refused_to_pages_and_to_other_methods_than_post() {
    let backend = Backend::start("a").await;
    let route = "              - {match: {prefix: \"/\"}, route: {cluster: up}}";
    let admin = "admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}\n";
    let text = format!("{}{admin}", bootstrap(route, "", &cluster("up", &[backend.address], "")));
    let proxy = Running::start(&text).await;
    for switch in ["/quitquitquit", "/drain_listeners", "/logging?level=trace"] {
        for (method, lines, status) in [
            ("GET", "", "405"),
            ("PUT", "", "405"),
            ("HEAD", "", "405"),
            ("POST", "origin: http://evil.example\r\n", "403"),
            ("POST", "origin: null\r\n", "403"),
        ] {
            let request =
                format!("{method} {switch} HTTP/1.1\r\nhost: a\r\n{lines}connection: close\r\n\r\n");
            let answer = raw(proxy.admin(), &request).await;
            assert_eq!(answer.get(9..12), Some(status), "{method} {switch} {lines}");
        }
    }
    assert_eq!(over_h1(&proxy, "/", "a").await, "200", "the proxy goes on");
    proxy.end().await;
}
