//! Inputs to begin with, a folder for each target. Most come from the test data of the crates, in the form in which a
//! target takes them.

use std::fs;
use std::path::{Path, PathBuf};

use envoy_types::pb::envoy::config::cluster::v3::Cluster;
use envoy_types::pb::envoy::config::core::v3::Node;
use envoy_types::pb::envoy::config::endpoint::v3::ClusterLoadAssignment;
use envoy_types::pb::envoy::config::listener::v3::Listener;
use envoy_types::pb::envoy::config::route::v3::RouteConfiguration;
use envoy_types::pb::envoy::service::discovery::v3::{DeltaDiscoveryRequest, DiscoveryRequest};
use prost::{Message, Name};
use serde_json::{Value, json};

struct Seeds {
    folder: PathBuf,
    count: usize,
}

impl Seeds {
    fn add(&mut self, target: &str, bytes: &[u8]) {
        let folder = self.folder.join(target);
        fs::create_dir_all(&folder).expect("a folder");
        self.count += 1;
        fs::write(folder.join(format!("seed-{}", self.count)), bytes).expect("a file");
    }

    /// With a first byte in front, which chooses among variants.
    fn choose(&mut self, target: &str, choice: u8, bytes: &[u8]) {
        self.add(target, &[&[choice], bytes].concat());
    }
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn files(folder: &str) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> =
        fs::read_dir(repository().join(folder)).expect(folder).flatten().map(|e| e.path()).collect();
    all.retain(|path| path.extension().is_none_or(|extension| extension != "rs"));
    all.sort();
    all
}

/// Writes them all.
pub fn write(folder: &Path) {
    let mut seeds = Seeds { folder: folder.to_owned(), count: 0 };
    configuration(&mut seeds);
    resources(&mut seeds);
    stored(&mut seeds);
    certificates(&mut seeds);
    http(&mut seeds);
    others(&mut seeds);
}

fn configuration(seeds: &mut Seeds) {
    for kind in ["good", "bad"] {
        for file in files(&format!("registry/tests/config/{kind}")) {
            seeds.add("istio", &fs::read(file).expect("a file"));
        }
    }
    seeds.add(
        "mesh_config",
        b"rootNamespace: istio-system\ndefaultConfig: {proxyMetadata: {A: b}, concurrency: 2}\n",
    );
    seeds.add(
        "mesh_config",
        b"outboundTrafficPolicy: {mode: REGISTRY_ONLY}\nextensionProviders:\n- {name: a, envoyFileAccessLog: {path: /dev/stdout, logFormat: {text: '%PROTOCOL%'}}}\n",
    );
}

/// A resource as its bytes, with the number of its type.
fn encoded(resource: &Value) -> Option<(u8, Vec<u8>)> {
    fn of<M: Message + Name + Default>(fields: &Value) -> Vec<u8> {
        wire::json::message_from_json::<M>(fields).expect("a golden resource").encode_to_vec()
    }
    let mut fields = resource.clone();
    let kind = fields.as_object_mut()?.remove("@type")?;
    let name = kind.as_str()?.rsplit('.').next()?.to_owned();
    Some(match name.as_str() {
        "Cluster" => (0, of::<Cluster>(&fields)),
        "ClusterLoadAssignment" => (1, of::<ClusterLoadAssignment>(&fields)),
        "Listener" => (2, of::<Listener>(&fields)),
        "RouteConfiguration" => (3, of::<RouteConfiguration>(&fields)),
        _ => return None,
    })
}

fn resources(seeds: &mut Seeds) {
    for file in files("xds/tests/golden") {
        let text = fs::read_to_string(file).expect("a file");
        let documents: Value = serde_saphyr::from_str(&text).expect("YAML");
        if let Some(proxy) = documents.get("proxy")
            && let Ok(node) = wire::json::message_from_json::<Node>(proxy)
        {
            requests(seeds, &node);
        }
        let mut lists = json!({"clusters": [], "listeners": []});
        for resource in documents["expect"].as_object().into_iter().flat_map(|all| all.values()) {
            let Some((kind, bytes)) = encoded(resource) else { continue };
            let length = u16::try_from(bytes.len()).expect("short").to_be_bytes();
            seeds.choose("resources", kind, &[&length[..], &bytes].concat());
            if let Some(number) = [0, 2, 3].iter().position(|k| *k == kind) {
                seeds.choose("xds_json", u8::try_from(number).expect("few"), &bytes);
            }
            let list = if kind == 0 { "clusters" } else { "listeners" };
            if matches!(kind, 0 | 2) {
                let mut fields = resource.clone();
                fields.as_object_mut().expect("fields").remove("@type");
                lists[list].as_array_mut().expect("a list").push(fields);
            }
        }
        seeds.add("bootstrap", json!({"static_resources": lists}).to_string().as_bytes());
    }
    seeds.add(
        "bootstrap",
        b"node: {id: a, metadata: {A: b}}\nadmin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}\n\
          dynamic_resources: {ads_config: {api_type: DELTA_GRPC, grpc_services: [{envoy_grpc: {cluster_name: a}}]}}\n",
    );
}

fn requests(seeds: &mut Seeds, node: &Node) {
    seeds.add("node", &node.encode_to_vec());
    for url in ["cluster.v3.Cluster", "endpoint.v3.ClusterLoadAssignment", "route.v3.RouteConfiguration"] {
        let type_url = format!("type.googleapis.com/envoy.config.{url}");
        let names = vec!["a".to_owned(), "*".to_owned()];
        let delta = DeltaDiscoveryRequest {
            type_url: type_url.clone(),
            resource_names_subscribe: names.clone(),
            resource_names_unsubscribe: names.clone(),
            response_nonce: "1-1".to_owned(),
            ..Default::default()
        };
        let whole = DiscoveryRequest { type_url, resource_names: names, ..Default::default() };
        for (form, bytes) in [(0, delta.encode_to_vec()), (1, whole.encode_to_vec())] {
            let length = u8::try_from(bytes.len()).expect("short");
            seeds.choose("xds_stream", form, &[&[length], &*bytes, &[length], &*bytes].concat());
        }
    }
}

fn stored(seeds: &mut Seeds) {
    let file = |path: &str| fs::read(repository().join(path)).expect("a file");
    seeds.add("stored_command", &file("registry/tests/state/log-v1.json"));
    let state = file("registry/tests/state/state-v1.bin");
    seeds.add("stored_state", &state[..state.len() - 4]);
    for recorded in files("istiod/tests/raft/recorded") {
        for line in fs::read_to_string(recorded).expect("a file").lines() {
            let digits: Vec<u8> = line.bytes().filter(u8::is_ascii_hexdigit).collect();
            let byte = |pair: &[u8]| {
                u8::from_str_radix(std::str::from_utf8(pair).expect("digits"), 16).expect("two")
            };
            let bytes: Vec<u8> = digits.chunks_exact(2).map(byte).collect();
            seeds.choose("log_entry", 0, &bytes);
            let entry = raft::eraftpb::Entry { index: 1, term: 1, data: bytes.into(), ..Default::default() };
            let entry = istiod::raft::wire::Entry::from(&entry);
            let batch = istiod::raft::wire::LogBatch { entries: vec![entry], ..Default::default() };
            let batch = batch.encode_to_vec();
            let length = u16::try_from(batch.len()).expect("short").to_be_bytes();
            seeds.choose("log_file", 1, &[&length[..], &*batch, &length, &batch].concat());
        }
    }
    let mut message = raft::eraftpb::Message::default();
    (message.to, message.from, message.term, message.index) = (2, 1, 7, 41);
    seeds.choose("raft_message", 0, &istiod::raft::wire::Message::from(&message).encode_to_vec());
    let mut sessions = istiod::raft::sessions::Sessions::default();
    assert!(sessions.admit(1, 1, 1) && sessions.admit(1, 3, 2) && sessions.admit(2, 1, 3));
    seeds.choose("raft_message", 2, &sessions.to_wire().encode_to_vec());
    seeds.add("ca_state", &ca::state::CaState::default().encode());
}

fn certificates(seeds: &mut Seeds) {
    let key = ca::svid::PrivateKey::generate().expect("a key");
    let request = key.request().expect("a request");
    seeds.choose("certificate_request", 0, request.der());
    seeds.choose("certificate_request", 1, request.pem().expect("text").as_bytes());
    seeds.add("pem", key.to_pem().as_bytes());
    for (names, is_ca) in
        [(&["spiffe://a/ns/b/sa/c"][..], false), (&["spiffe://a/ns/b/sa/c", "http://x"], true)]
    {
        let mut parameters = rcgen::CertificateParams::new(vec!["a.example".to_owned()]).expect("a name");
        let uri = |name: &&str| rcgen::SanType::URI((*name).try_into().expect("ASCII"));
        parameters.subject_alt_names.extend(names.iter().map(uri));
        if is_ca {
            parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Constrained(1));
        }
        let certificate = parameters.self_signed(&key.key_pair().expect("a key")).expect("a certificate");
        seeds.add("certificate", certificate.der());
        seeds.add("pem", certificate.pem().as_bytes());
    }
    for text in ["spiffe://cluster.local/ns/shop/sa/pay", "spiffe://a", "spiffe://a/control-plane"] {
        seeds.choose("identity", 0, text.as_bytes());
    }
    seeds.choose("identity", 1, b"cluster.local");
    let token = json!({"id": "00", "secret": "s", "endpoints": ["a:1"], "root_sha256": "ab".repeat(32),
        "namespace": "shop", "service_account": "pay", "trust_domain": "cluster.local"});
    seeds.choose("identity", 2, token.to_string().as_bytes());
    seeds.choose("identity", 3, "ab".repeat(32).as_bytes());
    seeds.choose("identity", 4, b"0123456789abcdef");
    let ticket = json!({"id": "00", "secret": "s", "peers": ["a:1"], "ca": "ab".repeat(32)});
    seeds.choose("operator_text", 0, ticket.to_string().as_bytes());
    seeds.choose("operator_text", 1, b"eyJyIjoxLCJrIjoiYSJ9");
    seeds.choose("operator_text", 2, b"a=b,c!=d,e in (f,g),h notin (i),!j,k\nmetadata.name=a,spec.host!=b");
    let header = json!({"key": "hkdf", "salt": "00"}).to_string();
    let length = u32::try_from(header.len()).expect("short").to_be_bytes();
    seeds.choose("operator_text", 3, &[b"MESHBAK\x01", &length[..], header.as_bytes()].concat());
}

fn http(seeds: &mut Seeds) {
    for how in [4, 12, 15, 14, 13] {
        for path in ["/a/./b/../c//d?x=/../", "/%61%2f%2E%2e/%5c\\x;y/..;z/{|}", "/100%/%zz%%32e"] {
            seeds.choose("path", how, path.as_bytes());
        }
    }
    seeds.choose(
        "headers",
        0,
        b"host:a\nconnection:close, x-a, host\nx-a:1\nte:gzip, trailers\ncookie:a=1\ncookie:b=2\nuser-agent:a\n\
          user-agent:b\nx-envoy-retry-on:5xx\nx-forwarded-for:1.1.1.1, [::1]:80\ngrpc-timeout:15m\nupgrade:h2c\n",
    );
    for lines in ["content-length: 3", "Content-Length: 3\r\ntransfer-encoding: chunked", "x: 1\r\nx: 2"] {
        seeds.choose(
            "request_head",
            7,
            format!("\r\nPOST / HTTP/1.1\r\nhost: a\r\n{lines}\r\n\r\nabc").as_bytes(),
        );
    }
    for rest in [
        "content-length: 3\r\n\r\nabc",
        "transfer-encoding: chunked\r\ntrailer: x\r\n\r\n3;a=b\r\nabc\r\n0\r\nx: 1\r\n\r\n",
        "connection: close\r\n\r\nabc",
    ] {
        seeds.choose("response", 14, format!("HTTP/1.1 100 \r\n\r\nHTTP/1.1 200 OK\r\n{rest}").as_bytes());
    }
    let frame = |kind: u8, flags: u8, length: u8| {
        [&[0, 0, length, kind, flags, 0, 0, 0, 1], &*vec![0; length.into()]].concat()
    };
    let frames: Vec<u8> =
        [(4, 0, 0), (1, 5, 9), (0, 0, 0), (9, 4, 3), (2, 0, 5), (3, 0, 4), (6, 0, 8), (8, 0, 4)]
            .iter()
            .flat_map(|(kind, flags, length)| frame(*kind, *flags, *length))
            .collect();
    seeds.choose("flood", 6, &[proxy::listener::detect::H2_PREFACE, &frames].concat());
    seeds.add("detect", b"GET /a HTTP/1.1\r\nhost: a\r\n\r\n");
    seeds.add("detect", proxy::listener::detect::H2_PREFACE);
    for hello in hellos() {
        seeds.add("detect", &hello);
    }
    seeds.add("proxy_protocol", b"PROXY TCP4 10.0.0.1 10.0.0.2 1 65535\r\nGET");
    seeds.add("proxy_protocol", b"PROXY UNKNOWN\r\n");
    let v2 = |family: u8, body: &[u8]| {
        let length = u16::try_from(body.len()).expect("short").to_be_bytes();
        [b"\r\n\r\n\0\r\nQUIT\n\x21", &[family][..], &length, body].concat()
    };
    seeds.add("proxy_protocol", &v2(0x11, &[10, 0, 0, 1, 10, 0, 0, 2, 0, 1, 0, 2, 4, 0, 1, 9]));
    seeds.add("proxy_protocol", &v2(0x21, &[7; 36]));
    seeds.choose("grpc_web", 3, b"AAAAAAVoZWxsbw==gAAAAA9ncnBjLXN0YXR1czogMA0K");
    seeds.choose("grpc_web", 7, b"\0\0\0\0\x05hello\0\0\0\0\0\0\0\0\0\x01x");
    for head in [
        &b"{\"alg\":\"ES256\",\"kid\":\"1\"}"[..],
        b"{\"alg\":\"RS256\"}",
        b"{\"alg\":\"none\"}",
        b"{\"alg\":\"HS256\",\"kid\":\"3\"}",
    ] {
        for place in 0..3 {
            seeds.choose(
                "jwt",
                place,
                &[head, b"\n{\"iss\":\"i\",\"aud\":[\"me\"],\"exp\":9999999999,\"nbf\":1}\n", &[b'x'; 64]]
                    .concat(),
            );
        }
    }
    seeds.choose("jwt", 3, br#"{"keys":[{"kty":"oct","k":"AA","alg":"HS256"},{"kty":"EC","crv":"P-384","x":"AA","y":"AA"},{"kty":"RSA","n":"AQAB","e":"AQAB","use":"sig"}]}"#);
    for request in [
        "GET /a/../b HTTP/1.1\r\nhost: a\r\n\r\n",
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\nabc",
        "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n0\r\nx-t: 1\r\n\r\n",
        "PUT http://b/x?y HTTP/1.1\r\nhost: a\r\nte: trailers\r\nexpect: 100-continue\r\ncontent-length: 0\r\n\r\n",
        "GET /w HTTP/1.1\r\nhost: a\r\nconnection: upgrade, x-a\r\nupgrade: websocket\r\nx-a: 1\r\n\r\n",
        "OPTIONS * HTTP/1.0\r\nhost: a\r\n\r\n",
    ] {
        seeds.add("http1", request.as_bytes());
        seeds.add("http1", request.repeat(2).as_bytes());
    }
    let head = b"\x83\x86\x84\x41\x01a\x00\x03x-a\x011\x60\x03a=b\x60\x03c=d";
    let http2 = |frames: &[(u8, u8, &[u8])]| {
        let one = |(kind, flags, body): &(u8, u8, &[u8])| {
            [&[0, 0, u8::try_from(body.len()).expect("short"), *kind, *flags, 0, 0, 0, 1], *body].concat()
        };
        frames.iter().flat_map(one).collect::<Vec<u8>>()
    };
    seeds.add("http2", &http2(&[(1, 5, head)]));
    seeds.add("http2", &http2(&[(1, 4, head), (0, 0, b"abc"), (1, 5, b"\x00\x03x-t\x011")]));
    seeds.add(
        "http2",
        &http2(&[(1, 0, &head[..6]), (9, 4, &head[6..]), (0, 9, b"\x01abc\x00"), (8, 0, &[0, 0, 0, 1])]),
    );
    seeds.add(
        "http2",
        &http2(&[(1, 4, &[head, &b"\x0f\x0d\x013"[..]].concat()), (0, 1, b"abc"), (3, 0, &[0, 0, 0, 8])]),
    );
    seeds.add("format", b"[%START_TIME(%Y-%m-%d)%] \"%REQ(:METHOD)% %REQ(X-A?:PATH):5%\" %RESPONSE_CODE% %DYNAMIC_METADATA(a:b:c)%\n");
    seeds.add("format", br#"{"a":"%UPSTREAM_HOST%","b":{"c":["%GRPC_STATUS%",1]}}"#);
    let metadata = json!({"NAME": "a", "NAMESPACE": "b", "LABELS": {"app": "c"}, "CLUSTER_ID": "d"});
    seeds.add("peer", metadata.to_string().as_bytes());
    seeds.add("peer", b"workload;namespace;service;revision;cluster");
    seeds.add("peer", b"ChYKBE5BTUUSDhoMcmV2aWV3cy12MQ==");
}

/// What clients of this project send first.
fn hellos() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for (name, alpn) in [("a.example", &[b"h2".to_vec(), b"istio".to_vec()][..]), ("127.0.0.1", &[])] {
        let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        config.alpn_protocols = alpn.to_vec();
        let name = name.try_into().expect("a name");
        let mut client = rustls::ClientConnection::new(config.into(), name).expect("a client");
        let mut hello = Vec::new();
        client.write_tls(&mut hello).expect("a hello");
        all.push(hello);
    }
    all
}

fn others(seeds: &mut Seeds) {
    use crate::dns_message::{Kind, query};
    for (name, kind) in [("a.example", Kind::V4), ("b.example.", Kind::V6)] {
        let asked = query(7, name, kind).expect("a name");
        seeds.add("dns_query", &asked);
        let read = agent::dns::message::Query::parse(&asked).expect("a query");
        let addresses = ["10.0.0.1".parse().expect("v4"), "fd00::1".parse().expect("v6")];
        let answer = read.answer(agent::dns::message::Code::NoError, &addresses, true);
        seeds.choose("dns_reply", 0, &answer);
        seeds.choose("dns_reply", 1, &answer);
    }
    let name = wire::mesh::Name { host: "*.a".to_owned(), addresses: vec!["10.0.0.1".to_owned()] };
    let names = wire::mesh::Names { names: vec![name], domain: "mesh".to_owned(), ..Default::default() };
    seeds.add("names", &names.encode_to_vec());
    seeds.add("members", b"10.0.0.1:15010,[::1]:15010,istiod.a:15010");
    seeds.choose("consul", 0, br#"{"web":["a","b"],"consul":[],"a_b.c":null}"#);
    seeds.choose(
        "consul",
        1,
        br#"[{"Node":{"Node":"n","Address":"10.0.0.1","Meta":{"zone":"a"},"Datacenter":"dc1"},"Service":{"ID":"web-1","Service":"web","Tags":["v1"],"Address":"","Port":8080,"Meta":{"protocol":"http"},"Weights":{"Passing":3,"Warning":1},"TaggedAddresses":{"wan":{"Address":"1.2.3.4","Port":1}},"Connect":{},"ModifyIndex":7},"Checks":[{"CheckID":"c","Status":"passing"}]}]"#,
    );
    seeds.choose(
        "consul",
        2,
        br#"{"Node":{"Node":"n","Address":"10.0.0.1"},"Services":{"a":{"ID":"a","Service":"a","Port":1}}}"#,
    );
    seeds.choose("consul", 3, br#"{"Results":null,"Errors":[{"OpIndex":1,"What":"no"}]}"#);
}
