//! Requests of an application, sent to our proxy and to a stock Envoy that were given the same resources.

use std::net::TcpListener;

use tests::envoy::Form;
use tests::mesh::{Mesh, strict, subsets};
use tests::workload::WorkloadSpec;

use crate::oracle::{Ask, Asked, Case, compare, get, raw, with};

/// Cases in which the two may differ, and why.
const DIFFERENCES: [(&str, &str); 11] = [
    (
        "direct response to a body",
        "Envoy closes a connection whose request body it has not read; ours reads it and goes on",
    ),
    ("OPTIONS", "a request without content needs no content-length (RFC 9110, section 8.6)"),
    (
        "preflight of another origin",
        "a request without content needs no content-length (RFC 9110, section 8.6)",
    ),
    (
        "a method of the client's own",
        "methods may be any token (RFC 9110, section 9.1); Envoy's parser knows a list",
    ),
    ("hop-by-hop headers", "Envoy obeys proxy-connection, which is no header of HTTP; ours drops it"),
    ("no version", "a bad request line gets 400; Envoy takes it for a version that is too old"),
    ("two hosts", "400, as RFC 9112, section 3.2 has it; Envoy joins them to a host that no route knows"),
    ("an empty host", "400; Envoy takes it for a host that no route knows"),
    ("a host with user information", "400: no host has it; Envoy takes it for a host that no route knows"),
    (
        "line feeds only",
        "refused: whoever takes them for no end of a line reads another request; Envoy takes them",
    ),
    ("a folded header", "refused, as RFC 9112, section 5.2 wants it; Envoy unfolds it"),
];

/// Every kind of match and of action that a VirtualService has.
const ROUTES: &str = r#"
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: {name: echo}
spec:
  hosts: [echo]
  http:
  - match: [{uri: {exact: /match/exact}}]
    route: [{destination: {host: echo, subset: v2}}]
  - match: [{uri: {prefix: /match/prefix/}}]
    route: [{destination: {host: echo, subset: v2}}]
  - match: [{uri: {regex: "/match/re[gx]+/[0-9]{2,3}"}}]
    route: [{destination: {host: echo, subset: v2}}]
  - match: [{uri: {exact: /match/nocase}, ignoreUriCase: true}]
    route: [{destination: {host: echo, subset: v2}}]
  - match: [{uri: {prefix: /match/header}, headers: {x-exact: {exact: one}}}]
    route: [{destination: {host: echo, subset: v2}}]
  - match: [{uri: {prefix: /match/header}, headers: {x-prefix: {prefix: two}}}]
    route: [{destination: {host: echo, subset: v2}}]
  - match: [{uri: {prefix: /match/header}, headers: {x-regex: {regex: "th.*ee"}}}]
    route: [{destination: {host: echo, subset: v2}}]
  - match: [{uri: {prefix: /match/header}, headers: {x-present: {}}}]
    route: [{destination: {host: echo, subset: v2}}]
  - match: [{uri: {prefix: /match/without}, withoutHeaders: {x-not: {exact: here}}}]
    route: [{destination: {host: echo, subset: v2}}]
  - match: [{uri: {prefix: /match/method}, method: {exact: PUT}}]
    route: [{destination: {host: echo, subset: v2}}]
  - match: [{uri: {prefix: /match/query}, queryParams: {v: {exact: "2"}}}]
    route: [{destination: {host: echo, subset: v2}}]
  - match: [{uri: {prefix: /match/query}, queryParams: {r: {regex: "a+"}}}]
    route: [{destination: {host: echo, subset: v2}}]
  - match: [{uri: {prefix: /match/authority}, authority: {regex: "echo.*:80"}}]
    route: [{destination: {host: echo, subset: v2}}]
  - match: [{uri: {prefix: /match/}}]
    route: [{destination: {host: echo, subset: v1}}]
  - match: [{uri: {prefix: /rewrite/prefix}}]
    rewrite: {uri: /new}
    route: [{destination: {host: echo, subset: v1}}]
  - match: [{uri: {prefix: /rewrite/slash/}}]
    rewrite: {uri: /}
    route: [{destination: {host: echo, subset: v1}}]
  - match: [{uri: {prefix: /rewrite/regex}}]
    rewrite: {uriRegexRewrite: {match: "^/rewrite/regex/([^/]+)/(.*)$", rewrite: "/\\2/\\1"}}
    route: [{destination: {host: echo, subset: v1}}]
  - match: [{uri: {prefix: /rewrite/authority}}]
    rewrite: {authority: new.example}
    route: [{destination: {host: echo, subset: v1}}]
  - match: [{uri: {exact: /redirect/uri}}]
    redirect: {uri: /else}
  - match: [{uri: {prefix: /redirect/prefix}}]
    redirect: {prefixRewrite: /else, redirectCode: 308}
  - match: [{uri: {exact: /redirect/relative}}]
    redirect: {uri: else}
  - match: [{uri: {exact: /redirect/authority}}]
    redirect: {authority: other.example, redirectCode: 302}
  - match: [{uri: {exact: /redirect/scheme}}]
    redirect: {scheme: https, redirectCode: 307}
  - match: [{uri: {exact: /redirect/port}}]
    redirect: {port: 8443, redirectCode: 303}
  - match: [{uri: {exact: /direct}}]
    directResponse: {status: 418, body: {string: short and stout}}
  - match: [{uri: {exact: /direct/empty}}]
    directResponse: {status: 204}
  - match: [{uri: {exact: /direct/headers}}]
    directResponse: {status: 200, body: {string: "{}"}}
    headers: {response: {set: {content-type: application/json}, add: {x-direct: "1"}}}
  - match: [{uri: {prefix: /headers}}]
    headers:
      request: {set: {x-set: "new"}, add: {x-add: "more"}, remove: [x-remove]}
      response: {set: {x-app: "changed"}, add: {x-added: "%PROTOCOL%"}, remove: [x-gone]}
    route:
    - destination: {host: echo, subset: v1}
      headers: {request: {set: {x-destination: v1}}}
  - match: [{uri: {prefix: /fault/abort}}]
    fault: {abort: {httpStatus: 555, percentage: {value: 100}}}
    route: [{destination: {host: echo, subset: v1}}]
  - match: [{uri: {prefix: /fault/delay}}]
    fault: {delay: {fixedDelay: 20ms, percentage: {value: 100}}}
    route: [{destination: {host: echo, subset: v1}}]
  - match: [{uri: {prefix: /fault/never}}]
    fault: {abort: {httpStatus: 555, percentage: {value: 0}}}
    route: [{destination: {host: echo, subset: v1}}]
  - match: [{uri: {prefix: /timeout}}]
    timeout: 1s
    route: [{destination: {host: echo, subset: v1}}]
  - match: [{uri: {prefix: /retry}}]
    retries: {attempts: 2, retryOn: "5xx,reset", perTryTimeout: 700ms, backoff: 5ms}
    route: [{destination: {host: echo, subset: v1}}]
  - match: [{uri: {prefix: /once}}]
    retries: {attempts: 0}
    route: [{destination: {host: echo, subset: v1}}]
  - match: [{uri: {prefix: /cors}}]
    corsPolicy:
      allowOrigins: [{exact: "https://good.example"}, {regex: "https://.*\\.fine\\.example"}]
      allowMethods: [GET, PUT]
      allowHeaders: [x-a, x-b]
      exposeHeaders: [x-c]
      maxAge: 1h
      allowCredentials: true
    route: [{destination: {host: echo, subset: v1}}]
  - match: [{uri: {prefix: /weights}}]
    route:
    - {destination: {host: echo, subset: v1}, weight: 0}
    - {destination: {host: echo, subset: v2}, weight: 100}
  - match: [{uri: {prefix: /nobody}}]
    route: [{destination: {host: echo, subset: v9}}]
  - match: [{uri: {prefix: /refused/once}}]
    retries: {attempts: 0}
    route: [{destination: {host: refused.example}}]
  - match: [{uri: {prefix: /refused}}]
    route: [{destination: {host: refused.example}}]
  - match: [{uri: {prefix: /impostor}}]
    retries: {attempts: 0}
    route: [{destination: {host: victim.example}}]
  - match: [{uri: {prefix: /ok}}]
    route: [{destination: {host: echo, subset: v1}}]
---
"#;

/// A host whose only endpoint has another identity than it should.
fn impostor(address: std::net::IpAddr) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: victim}}\nspec:\n  \
         hosts: [victim.example]\n  location: MESH_INTERNAL\n  resolution: STATIC\n  \
         ports: [{{number: 80, name: http, protocol: HTTP}}]\n  endpoints:\n  \
         - {{address: {address}, serviceAccount: victim, labels: {{security.istio.io/tlsMode: istio}}}}\n---\n"
    )
}

/// A host whose only endpoint takes no connections.
fn refused(port: u16) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: refused}}\nspec:\n  hosts: [refused.example]\n  \
         location: MESH_EXTERNAL\n  resolution: STATIC\n  ports: [{{number: 80, name: http, protocol: HTTP, targetPort: {port}}}]\n  \
         endpoints: [{{address: 127.0.0.1}}]\n---\n"
    )
}

fn matches() -> Vec<Case> {
    vec![
        get("exact path", "/match/exact"),
        get("exact path with a query", "/match/exact?a=b"),
        get("exact path and more", "/match/exact/more"),
        get("prefix", "/match/prefix/a/b?c"),
        get("prefix without its end", "/match/prefix"),
        get("regular expression", "/match/regx/123"),
        get("regular expression matches the whole path", "/match/regx/1234"),
        get("path in other case", "/MATCH/noCase"),
        with("header, exact", "/match/header", &[("x-exact", "one")]),
        with("header, exact, another value", "/match/header", &[("x-exact", "one more")]),
        with("header twice", "/match/header", &[("x-exact", "one"), ("x-exact", "two")]),
        with("header, prefix", "/match/header", &[("x-prefix", "two and more")]),
        with("header, regular expression", "/match/header", &[("x-regex", "thrrree")]),
        with("header, present", "/match/header", &[("x-present", "")]),
        get("no header", "/match/header"),
        get("without a header", "/match/without"),
        with("with the header that must not be", "/match/without", &[("x-not", "here")]),
        with("with another value first", "/match/without", &[("x-not", "there"), ("x-not", "here")]),
        with("with another value last", "/match/without", &[("x-not", "here"), ("x-not", "there")]),
        with("header twice, in the other order", "/match/header", &[("x-exact", "two"), ("x-exact", "one")]),
        with("header twice, joined", "/match/header", &[("x-exact", "one,two")]),
        with("header twice, prefix", "/match/header", &[("x-prefix", "one"), ("x-prefix", "two")]),
        ("method", Ask::Http1("PUT", "/match/method", &[], 10)),
        ("another method", Ask::Http1("POST", "/match/method", &[], 10)),
        get("query parameter", "/match/query?x=1&v=2"),
        get("query parameter, another value", "/match/query?v=22"),
        get("query parameter, regular expression", "/match/query?r=aaa"),
        get("query parameter, encoded", "/match/query?v=%32"),
        with("authority with its port", "/match/authority", &[("host", "echo:80")]),
        with("authority in upper case", "/match/exact", &[("host", "ECHO")]),
        with("authority, whole name", "/match/exact", &[("host", "echo.default.svc.cluster.local")]),
        with("authority with another port", "/match/exact", &[("host", "echo:1234")]),
        with("unknown authority", "/match/exact", &[("host", "unknown.example")]),
        get("no route", "/none"),
        get("weights of 0 and 100", "/weights"),
        get("doubled slashes", "//match//exact"),
        get("dots", "/match/./prefix/../exact"),
        get("encoded letters", "/match/%65xact"),
        get("encoded slash", "/match%2fexact"),
        get("dots above the root", "/../match/exact"),
        get("encoded dots", "/match/%2e%2e/match/exact"),
        get("backslash", "/match\\exact"),
        get("a fragment", "/match/exact#part"),
    ]
}

fn actions() -> Vec<Case> {
    vec![
        get("rewrite of a prefix", "/rewrite/prefix/a?b=c"),
        get("rewrite of exactly the prefix", "/rewrite/prefix"),
        get("rewrite to the root", "/rewrite/slash/a"),
        get("rewrite by regular expression", "/rewrite/regex/one/two/three?q=1"),
        get("rewrite of the authority", "/rewrite/authority"),
        get("redirect of the path", "/redirect/uri?a=b"),
        get("redirect of a prefix", "/redirect/prefix/rest?a=b"),
        get("redirect to a path without a slash", "/redirect/relative"),
        get("redirect of the authority", "/redirect/authority?a=b"),
        get("redirect of the scheme", "/redirect/scheme"),
        get("redirect of the port", "/redirect/port"),
        get("direct response", "/direct"),
        ("direct response to HEAD", Ask::Http1("HEAD", "/direct", &[], 0)),
        ("direct response to a body", Ask::Http1("POST", "/direct", &[], 1000)),
        get("direct response without a body", "/direct/empty"),
        get("direct response with headers", "/direct/headers"),
        with(
            "header operations",
            "/headers?set=x-app:old",
            &[("x-set", "old"), ("x-add", "first"), ("x-remove", "1")],
        ),
        get("header operations remove from the answer", "/headers?set=x-gone:1"),
        get("fault, abort", "/fault/abort"),
        get("fault, delay", "/fault/delay"),
        get("fault with a percentage of 0", "/fault/never"),
        get("timeout", "/timeout?delay_ms=4000"),
        get("answer in time", "/timeout?delay_ms=1"),
        get("retries that help", "/retry?status=500&fail=2&key=WHO-a"),
        get("retries that do not", "/retry?status=503&fail=5&key=WHO-b"),
        get("retries after a reset", "/retry?reset=1&fail=1&key=WHO-c"),
        get("timeout of each try", "/retry?delay_ms=4000"),
        get("no retries", "/once?status=503"),
        get("reset without retries", "/once?reset=1"),
        with(
            "the client asks for retries",
            "/once?status=500&fail=1&key=WHO-d",
            &[("x-envoy-retry-on", "5xx"), ("x-envoy-max-retries", "2")],
        ),
        with(
            "the client asks for a timeout",
            "/ok?delay_ms=2000",
            &[("x-envoy-upstream-rq-timeout-ms", "100")],
        ),
        get("no endpoint", "/nobody"),
        get("refused connection", "/refused"),
        get("a server of another identity", "/impostor"),
        get("refused connection without retries", "/refused/once"),
        (
            "preflight",
            Ask::Http1(
                "OPTIONS",
                "/cors",
                &[("origin", "https://good.example"), ("access-control-request-method", "PUT")],
                0,
            ),
        ),
        (
            "preflight of another origin",
            Ask::Http1(
                "OPTIONS",
                "/cors",
                &[("origin", "https://bad.example"), ("access-control-request-method", "PUT")],
                0,
            ),
        ),
        with("simple request of an origin", "/cors", &[("origin", "https://a.fine.example")]),
        with("simple request of another origin", "/cors", &[("origin", "https://bad.example")]),
    ]
}

#[expect(clippy::too_many_lines, reason = "a table")]
fn exchanges() -> Vec<Case> {
    vec![
        ("HEAD", Ask::Http1("HEAD", "/ok", &[], 0)),
        ("DELETE", Ask::Http1("DELETE", "/ok", &[], 0)),
        ("OPTIONS", Ask::Http1("OPTIONS", "/ok", &[], 0)),
        ("TRACE", Ask::Http1("TRACE", "/ok", &[], 0)),
        ("PATCH with a body", Ask::Http1("PATCH", "/ok", &[], 5)),
        ("a method of the client's own", Ask::Http1("FROBNICATE", "/ok", &[], 0)),
        ("a large body", Ask::Http1("POST", "/ok", &[], 2_000_000)),
        ("HTTP/2", Ask::Http2("GET", "/match/exact", &[], 0)),
        ("HTTP/2 with a body", Ask::Http2("POST", "/ok", &[], 100_000)),
        ("HTTP/2, no route", Ask::Http2("GET", "/none", &[], 0)),
        (
            "gRPC, no route",
            Ask::Http2("POST", "/none", &[("content-type", "application/grpc"), ("te", "trailers")], 5),
        ),
        (
            "gRPC, no endpoint",
            Ask::Http2("POST", "/nobody", &[("content-type", "application/grpc"), ("te", "trailers")], 5),
        ),
        (
            "gRPC, refused connection",
            Ask::Http2("POST", "/refused", &[("content-type", "application/grpc"), ("te", "trailers")], 5),
        ),
        (
            "gRPC, fault",
            Ask::Http2(
                "POST",
                "/fault/abort",
                &[("content-type", "application/grpc"), ("te", "trailers")],
                5,
            ),
        ),
        (
            "gRPC, direct response",
            Ask::Http2("POST", "/direct", &[("content-type", "application/grpc"), ("te", "trailers")], 5),
        ),
        (
            "gRPC",
            Ask::Http2("POST", "/ok/Call/3", &[("content-type", "application/grpc"), ("te", "trailers")], 5),
        ),
        with(
            "hop-by-hop headers",
            "/ok",
            &[
                ("connection", "keep-alive, x-hop"),
                ("keep-alive", "timeout=5"),
                ("x-hop", "1"),
                ("te", "trailers"),
                ("proxy-connection", "close"),
            ],
        ),
        with("the client closes", "/ok", &[("connection", "close")]),
        with(
            "x-forwarded headers",
            "/ok",
            &[("x-forwarded-for", "10.1.2.3"), ("x-forwarded-proto", "https"), ("x-forwarded-host", "h")],
        ),
        with("a request id", "/ok", &[("x-request-id", "mine")]),
        with("a trace", "/ok", &[("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")]),
        with(
            "envoy's own headers",
            "/ok",
            &[
                ("x-envoy-original-path", "/x"),
                ("x-envoy-internal", "true"),
                ("x-envoy-external-address", "1.2.3.4"),
                ("x-envoy-decorator-operation", "op"),
            ],
        ),
        with(
            "the mesh's own headers",
            "/ok",
            &[
                ("x-envoy-peer-metadata", "AAAA"),
                ("x-envoy-peer-metadata-id", "forged"),
                ("x-forwarded-client-cert", "URI=forged"),
            ],
        ),
        with("an attempt count", "/ok", &[("x-envoy-attempt-count", "7")]),
        with("many values", "/ok", &[("x-many", "1"), ("x-many", "2"), ("cookie", "a=1"), ("cookie", "b=2")]),
        with(
            "user agent",
            "/ok",
            &[("user-agent", "curl/8"), ("accept", "*/*"), ("accept-encoding", "gzip")],
        ),
        get("answer with 404", "/ok?status=404"),
        get("answer with 304", "/ok?status=304"),
        get("answer with 204", "/ok?status=204"),
        get("answer with a server header", "/ok?set=server:mine"),
        get("answer that closes", "/ok?set=connection:close"),
        get("answer with a via header", "/ok?set=via:1.1"),
    ]
}

#[expect(clippy::too_many_lines, reason = "a table")]
fn malformed() -> Vec<Case> {
    let long = format!("GET /ok HTTP/1.1\r\nhost: echo\r\nx-long: {}\r\n\r\n", "a".repeat(70_000));
    let many: String = (0..200).map(|i| format!("x-{i}: 1\r\n")).collect();
    let url = format!("GET /ok?{} HTTP/1.1\r\nhost: echo\r\n\r\n", "a".repeat(70_000));
    vec![
        raw("HTTP/1.0", "GET /ok HTTP/1.0\r\nhost: echo\r\n\r\n"),
        raw("HTTP/1.1 without a host", "GET /ok HTTP/1.1\r\n\r\n"),
        raw("two hosts", "GET /ok HTTP/1.1\r\nhost: echo\r\nhost: other\r\n\r\n"),
        raw("an empty host", "GET /ok HTTP/1.1\r\nhost:\r\n\r\n"),
        raw("HTTP/3.7", "GET /ok HTTP/3.7\r\nhost: echo\r\n\r\n"),
        raw("no version", "GET /ok\r\nhost: echo\r\n\r\n"),
        raw("a method with a space", "GE T /ok HTTP/1.1\r\nhost: echo\r\n\r\n"),
        raw("a method with a colon", "G:T /ok HTTP/1.1\r\nhost: echo\r\n\r\n"),
        raw("no TLS and no HTTP", "hello, world\r\n\r\n"),
        raw("an empty line first", "\r\nGET /ok HTTP/1.1\r\nhost: echo\r\nconnection: close\r\n\r\n"),
        raw("line feeds only", "GET /ok HTTP/1.1\nhost: echo\nconnection: close\n\n"),
        raw("a space before the colon", "GET /ok HTTP/1.1\r\nhost : echo\r\n\r\n"),
        raw("a header without a colon", "GET /ok HTTP/1.1\r\nhost: echo\r\nnonsense\r\n\r\n"),
        raw("a folded header", "GET /ok HTTP/1.1\r\nhost: echo\r\nx-a: 1\r\n 2\r\nconnection: close\r\n\r\n"),
        raw("a null in a header", "GET /ok HTTP/1.1\r\nhost: echo\r\nx-a: 1\x002\r\n\r\n"),
        raw("a null in the path", "GET /o\0k HTTP/1.1\r\nhost: echo\r\n\r\n"),
        raw(
            "length and chunks",
            "POST /ok HTTP/1.1\r\nhost: echo\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        raw(
            "two lengths",
            "POST /ok HTTP/1.1\r\nhost: echo\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        ),
        raw(
            "a length that is no number",
            "POST /ok HTTP/1.1\r\nhost: echo\r\ncontent-length: five\r\n\r\nhello",
        ),
        raw("a negative length", "POST /ok HTTP/1.1\r\nhost: echo\r\ncontent-length: -5\r\n\r\nhello"),
        raw("a length with a plus", "POST /ok HTTP/1.1\r\nhost: echo\r\ncontent-length: +5\r\n\r\nhello"),
        raw("an unknown encoding", "POST /ok HTTP/1.1\r\nhost: echo\r\ntransfer-encoding: gzip\r\n\r\n"),
        raw(
            "chunked is not last",
            "POST /ok HTTP/1.1\r\nhost: echo\r\ntransfer-encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
        ),
        raw("a bad chunk", "POST /ok HTTP/1.1\r\nhost: echo\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n"),
        raw(
            "a chunked body",
            "POST /ok HTTP/1.1\r\nhost: echo\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
        ),
        raw(
            "chunks with extensions and trailers",
            "POST /ok HTTP/1.1\r\nhost: echo\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\nx-t: 1\r\n\r\n",
        ),
        raw("an absolute URI", "GET http://echo/ok HTTP/1.1\r\nhost: other\r\nconnection: close\r\n\r\n"),
        raw(
            "a URI of another scheme",
            "GET ftp://echo/ok HTTP/1.1\r\nhost: echo\r\nconnection: close\r\n\r\n",
        ),
        raw("OPTIONS of everything", "OPTIONS * HTTP/1.1\r\nhost: echo\r\nconnection: close\r\n\r\n"),
        raw("CONNECT", "CONNECT echo:80 HTTP/1.1\r\nhost: echo:80\r\n\r\n"),
        raw("a path without a slash", "GET ok HTTP/1.1\r\nhost: echo\r\n\r\n"),
        raw("a header that is too long", long),
        raw("too many headers", format!("GET /ok HTTP/1.1\r\nhost: echo\r\n{many}\r\n")),
        raw("a path that is too long", url),
        raw(
            "continue",
            "POST /ok HTTP/1.1\r\nhost: echo\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n",
        ),
        raw(
            "another expectation",
            "POST /ok HTTP/1.1\r\nhost: echo\r\nexpect: miracles\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello",
        ),
        raw(
            "an upgrade to h2c",
            "GET /ok HTTP/1.1\r\nhost: echo\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n\r\n",
        ),
        raw(
            "an unknown upgrade",
            "GET /ok HTTP/1.1\r\nhost: echo\r\nconnection: upgrade\r\nupgrade: frobnicate\r\n\r\n",
        ),
        raw("a host with a space", "GET /ok HTTP/1.1\r\nhost: ec ho\r\n\r\n"),
        raw(
            "a host with user information",
            "GET /ok HTTP/1.1\r\nhost: user@echo\r\nconnection: close\r\n\r\n",
        ),
        raw(
            "two requests at once",
            "GET /ok HTTP/1.1\r\nhost: echo\r\n\r\nGET /none HTTP/1.1\r\nhost: echo\r\nconnection: close\r\n\r\n",
        ),
        raw(
            "bytes above 127 in the path",
            b"GET /ok/\xff HTTP/1.1\r\nhost: echo\r\nconnection: close\r\n\r\n".to_vec(),
        ),
        raw(
            "bytes above 127 in a header",
            b"GET /ok HTTP/1.1\r\nhost: echo\r\nx-a: \xff\r\nconnection: close\r\n\r\n".to_vec(),
        ),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_application_cannot_tell_our_proxy_from_envoy() -> anyhow::Result<()> {
    let mut mesh = Mesh::start(&[], &["echo-v1", "echo-v2"], &[]).await?;
    // Nobody listens there, and nobody else will while the port is held.
    let closed = TcpListener::bind("127.0.0.2:0")?.local_addr()?.port();
    let impostor = impostor(mesh.of("echo-v1")?.inbound(80).ip());
    let yaml =
        strict().to_owned() + &subsets("echo", &["v1", "v2", "v9"]) + ROUTES + &refused(closed) + &impostor;
    mesh.istiod.apply_and_wait(&yaml).await?;
    let caller =
        |name: &str| WorkloadSpec { service_account: "caller".to_owned(), ..WorkloadSpec::client(name) };
    mesh.workload(&caller("ours")).await?;
    mesh.seat_envoy(caller("theirs"), Form::Delta).await?;
    mesh.istiod.synced("ours.default").await?;
    let mut asked = Vec::new();
    for name in ["ours", "theirs"] {
        asked.push(Asked { name, address: mesh.address(name, "echo", 80).await?, host: "echo" });
    }
    let [ours, theirs] = asked.as_slice() else { anyhow::bail!("two are asked") };
    let cases = [matches(), actions(), exchanges(), malformed()].concat();
    compare(*ours, *theirs, cases, &DIFFERENCES).await?;
    mesh.envoy("theirs")?.refused_nothing().await?;
    mesh.finish(&[])
}
