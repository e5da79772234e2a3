//! Requests that come to a server, by our proxy and by a stock Envoy that were given the same resources.

use anyhow::ensure;
use tests::envoy::Form;
use tests::mesh::{Mesh, service, strict};
use tests::tls::{self, Authority, Credentials};
use tests::workload::{WorkloadSpec, own_address};

use crate::oracle::{Ask, Asked, Case, compare, get, with};

/// Cases in which the two may differ, and why.
const DIFFERENCES: [(&str, &str); 0] = [];

/// What each of the two servers is protected by.
fn policies(app: &str) -> String {
    let policy = |name: &str, action: &str, rules: &str| {
        format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}-{app}}}\nspec:\n  \
             selector: {{matchLabels: {{app: {app}}}}}\n  action: {action}\n  rules:\n{rules}---\n"
        )
    };
    policy(
        "allow",
        "ALLOW",
        "  - from: [{source: {principals: [cluster.local/ns/default/sa/client]}}]\n    \
         to: [{operation: {methods: [GET, POST, HEAD], paths: [/, /open/*, '*.css', /dots/a]}}]\n  \
         - from: [{source: {namespaces: [default]}}]\n    to: [{operation: {paths: [/namespace]}}]\n  \
         - from: [{source: {notPrincipals: [cluster.local/ns/default/sa/client]}}]\n    to: [{operation: {paths: [/others]}}]\n  \
         - to: [{operation: {paths: [/ports], ports: ['80']}}]\n  \
         - to: [{operation: {paths: [/hosts], hosts: ['server*']}}]\n  \
         - to: [{operation: {paths: [/when]}}]\n    when: [{key: 'request.headers[x-role]', values: [admin, 'ops-*']}]\n  \
         - to: [{operation: {paths: [/not], notMethods: [DELETE]}}]\n",
    ) + &policy(
        "deny",
        "DENY",
        "  - to: [{operation: {paths: [/open/secret*]}}]\n  - when: [{key: 'request.headers[x-bad]', values: ['*']}]\n",
    )
}

fn cases() -> Vec<Case> {
    vec![
        get("allowed", "/"),
        get("allowed by a prefix", "/open/a/b"),
        get("allowed by a suffix", "/x/style.css"),
        get("a query does not count", "/?a=/closed"),
        get("denied: no rule", "/closed"),
        get("denied by the other policy", "/open/secrets"),
        ("allowed method", Ask::Http1("POST", "/", &[], 10)),
        ("denied method", Ask::Http1("DELETE", "/", &[], 0)),
        ("HEAD", Ask::Http1("HEAD", "/", &[], 0)),
        ("denied HEAD", Ask::Http1("HEAD", "/closed", &[], 0)),
        get("by namespace", "/namespace"),
        get("not this principal", "/others"),
        get("by port", "/ports"),
        get("by host", "/hosts"),
        with("by header", "/when", &[("x-role", "admin")]),
        with("by a header's prefix", "/when", &[("x-role", "ops-1")]),
        with("by a header, another value", "/when", &[("x-role", "guest")]),
        with("denied by a header", "/", &[("x-bad", "1")]),
        with("denied by an empty header", "/", &[("x-bad", "")]),
        ("excepted method", Ask::Http1("DELETE", "/not", &[], 0)),
        get("another than the excepted method", "/not"),
        get("dots are resolved", "/open/../closed"),
        get("dots are resolved before a denial", "/open/x/../secret"),
        get("doubled slashes", "//open//secret"),
        get("encoded", "/open/%73ecret"),
        get("encoded slash", "/open%2fsecret"),
        get("upper case", "/OPEN/secret"),
        with(
            "forged identity",
            "/",
            &[("x-forwarded-client-cert", "By=x;URI=spiffe://cluster.local/ns/default/sa/root")],
        ),
        with(
            "forged peer",
            "/",
            &[("x-envoy-peer-metadata", "AAAA"), ("x-envoy-peer-metadata-id", "forged")],
        ),
        with("forwarded for", "/", &[("x-forwarded-for", "10.0.0.1")]),
        get("the application's error", "/?status=500"),
        get("the application's error, unavailable", "/?status=503"),
        get("the application closes", "/?reset=1"),
        ("HTTP/2", Ask::Http2("GET", "/", &[], 0)),
        ("HTTP/2, denied", Ask::Http2("GET", "/closed", &[], 0)),
        (
            "gRPC, denied",
            Ask::Http2("POST", "/closed", &[("content-type", "application/grpc"), ("te", "trailers")], 5),
        ),
        (
            "gRPC",
            Ask::Http2(
                "POST",
                "/open/Call/5",
                &[("content-type", "application/grpc"), ("te", "trailers")],
                5,
            ),
        ),
        ("a large body", Ask::Http1("POST", "/", &[], 1_000_000)),
    ]
}

/// Two servers, `serverours-v1` behind our proxy and `servertheirs-v1` behind Envoy, and a client with our proxy.
async fn two_servers() -> anyhow::Result<Mesh> {
    let mut mesh = Mesh::start(&[], &["serverours-v1"], &["client"]).await?;
    let yaml =
        strict().to_owned() + &service("servertheirs") + &policies("serverours") + &policies("servertheirs");
    mesh.istiod.apply_and_wait(&yaml).await?;
    let spec = WorkloadSpec::server("servertheirs", "v1", ([127, 0, 0, 1], 1).into());
    mesh.seat_envoy(spec, Form::Delta).await?;
    mesh.istiod.healthy("servertheirs", 1).await?;
    for server in ["serverours", "servertheirs"] {
        mesh.answers("client", server).await?;
    }
    Ok(mesh)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_caller_cannot_tell_our_proxy_from_envoy_in_front_of_a_server() -> anyhow::Result<()> {
    let mesh = two_servers().await?;
    let ours = Asked {
        name: "serverours",
        address: mesh.address("client", "serverours", 80).await?,
        host: "serverours",
    };
    let theirs = Asked {
        name: "servertheirs",
        address: mesh.address("client", "servertheirs", 80).await?,
        host: "servertheirs",
    };
    compare(ours, theirs, cases(), &DIFFERENCES).await?;
    mesh.finish(&[])
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_refuse_the_same_certificates() -> anyhow::Result<()> {
    let mesh = two_servers().await?;
    let theirs = own_address(mesh.envoy("servertheirs-v1")?.block);
    let client = mesh.of("client")?.data.clone();
    let foreign = Authority::new()?;
    for (name, address) in [("ours", mesh.of("serverours-v1")?.inbound(80)), ("theirs", (theirs, 80).into())]
    {
        let known = tls::get(address, Some(Credentials::of_agent(&client)?), "server").await?;
        ensure!(known.status == 200, "{name}: {known:?}");
        let other = foreign.issue("spiffe://cluster.local/ns/default/sa/client")?;
        for (refused, credentials) in [("nobody", None), ("another CA", Some(other))] {
            let answer = tls::get(address, credentials, "server").await;
            ensure!(answer.is_err(), "{name} answered {refused}: {answer:?}");
        }
        let plain = tests::http::get(address, "server", "/", &[]).await;
        ensure!(plain.is_err(), "{name} answered plaintext: {plain:?}");
    }
    mesh.finish(&[])
}
