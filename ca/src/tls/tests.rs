use std::io;
use std::time::Duration;

use rcgen::ExtendedKeyUsagePurpose::{ClientAuth as ForClients, ServerAuth as ForServers};
use rustls::HandshakeKind;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;

use super::*;
use crate::authn::Hash;
use crate::client::bootstrap_tls;
use crate::fixtures::{HOUR, ca, ca_at, certified, domain, id, now, ratings, reviews, serial_of};
use crate::identity::TrustDomain;

type ClientStream = tokio_rustls::client::TlsStream<TcpStream>;

fn watch_of(identity: Arc<Identity>) -> IdentityWatch {
    watch::channel(identity).1
}

/// One handshake over loopback with one echoed byte, so that both sides are known to have finished.
async fn handshake(
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
) -> io::Result<(TlsConnection<TcpStream>, ClientStream)> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let server = async {
        let (socket, _) = listener.accept().await?;
        let mut stream = accept(socket, &ServerContext::from(server)).await?;
        echo_one(&mut stream).await?;
        Ok(stream)
    };
    let client = async {
        let socket = TcpStream::connect(address).await?;
        let name = ServerName::try_from("reviews.default.svc.cluster.local").map_err(io::Error::other)?;
        let mut stream = TlsConnector::from(client).connect(name, socket).await?;
        ask_one(&mut stream).await?;
        Ok(stream)
    };
    let both = async {
        // a refused side closes, which ends the other one too: run both to their ends
        let (server, client): (io::Result<_>, io::Result<_>) = tokio::join!(server, client);
        match (server, client) {
            (Ok(server), Ok(client)) => Ok((server, client)),
            (Err(error), Ok(_)) | (Ok(_), Err(error)) => Err(error),
            (Err(s), Err(c)) => Err(io::Error::other(format!("server: {s}; client: {c}"))),
        }
    };
    tokio::time::timeout(Duration::from_secs(10), both).await?
}

async fn echo_one(stream: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin)) -> io::Result<()> {
    let byte = stream.read_u8().await?;
    stream.write_u8(byte).await?;
    stream.flush().await
}

async fn ask_one(stream: &mut (impl AsyncReadExt + AsyncWriteExt + Unpin)) -> io::Result<()> {
    stream.write_u8(7).await?;
    stream.flush().await?;
    assert_eq!(stream.read_u8().await?, 7);
    Ok(())
}

#[track_caller]
fn refused<T>(result: io::Result<T>, reason: &str) {
    let text = result.err().expect("must be refused").to_string();
    assert!(text.contains(reason), "{text}");
}

/// A server with this identity that requires certificates of its trust domain.
fn server_of(identity: Arc<Identity>) -> Arc<ServerConfig> {
    server_config(watch_of(identity), ClientAuth::Required, &[b"h2", b"http/1.1"]).unwrap()
}

fn client_of(identity: Arc<Identity>, expected: SpiffeId) -> Arc<ClientConfig> {
    client_config(watch_of(identity), ExpectedIdentities::one(expected), &[b"h2"]).unwrap()
}

#[tokio::test]
async fn both_sides_know_each_other() {
    let ca = ca();
    let client = client_of(ca.issue(&ratings()), reviews());
    let (server, client) = handshake(server_of(ca.issue(&reviews())), client).await.unwrap();
    assert_eq!(server.peer().identity(), Some(ratings()));
    let state = client.get_ref().1;
    assert_eq!(peer_identity(state), Some(reviews()));
    assert_eq!(state.alpn_protocol(), Some(b"h2".as_slice()));
    assert_eq!(state.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    let suite = state.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(suite, rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    assert_eq!(peer_identity(server.into_stream().get_ref().1), Some(ratings()));
}

#[tokio::test]
async fn tls_1_2_verifies_the_same() {
    let ca = ca();
    let client = |expected| {
        let trust = Trust::Current(watch_of(ca.issue(&ratings())));
        let verify = Verify::Peer { trust, expected: ExpectedIdentities::one(expected) };
        let config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS12])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verify::PeerVerifier::new(verify, true)))
            .with_client_cert_resolver(Arc::new(Own::Current(watch_of(ca.issue(&ratings())))));
        Arc::new(config)
    };
    let server = server_of(ca.issue(&reviews()));
    let (stream, _) = handshake(Arc::clone(&server), client(reviews())).await.unwrap();
    assert_eq!(stream.peer().identity(), Some(ratings()));
    refused(handshake(server, client(ratings())).await, "none of the expected identities");
}

#[tokio::test]
async fn a_server_with_another_identity_is_refused_even_by_the_right_authority() {
    let ca = ca();
    let client = client_of(ca.issue(&ratings()), reviews());
    let result = handshake(server_of(ca.issue(&id("cluster.local/ns/default/sa/details"))), client).await;
    refused(result, "none of the expected identities");
    let nobody =
        client_config(watch_of(ca.issue(&ratings())), ExpectedIdentities::Exactly([].into()), &[]).unwrap();
    refused(handshake(server_of(ca.issue(&reviews())), nobody).await, "none of the expected identities");
}

#[tokio::test]
async fn peers_of_another_authority_are_refused() {
    let (ours, theirs) = (ca(), ca());
    let client = client_of(theirs.issue(&ratings()), reviews());
    refused(handshake(server_of(ours.issue(&reviews())), client).await, "UnknownIssuer");
    // the client believes ours, but presents theirs
    let client = ClientTls {
        own: Own::Current(watch_of(theirs.issue(&ratings()))),
        verify: Verify::Peer {
            trust: Trust::Current(watch_of(ours.issue(&ratings()))),
            expected: ExpectedIdentities::one(reviews()),
        },
        alpn: Vec::new(),
        min_version: MinVersion::Tls12,
    };
    let result = handshake(server_of(ours.issue(&reviews())), client.build().unwrap()).await;
    refused(result, "UnknownIssuer");
}

#[tokio::test]
async fn clients_of_another_trust_domain_are_refused_even_below_the_same_root() {
    let ca = ca();
    let other = TrustDomain::parse("other.domain").unwrap();
    let authority =
        ca.root.member(&other, "b", Default::default(), now(), crate::fixtures::serial()).unwrap();
    let foreign = crate::fixtures::Ca { root: ca_at(&other, now()).root, authority: Arc::new(authority) };
    let client = client_of(foreign.issue(&id("other.domain/ns/default/sa/ratings")), reviews());
    refused(handshake(server_of(ca.issue(&reviews())), client).await, "trust domain that is not accepted");
}

#[tokio::test]
async fn certificates_that_are_not_valid_now_are_refused() {
    let ca = ca_at(&domain(), now() - HOUR * 48);
    let ended = ca.issue_at(&ratings(), now() - HOUR * 24, HOUR);
    let client = client_of(ended, reviews());
    refused(handshake(server_of(ca.issue(&reviews())), client).await, "Expired");
    let early = ca.issue_at(&ratings(), now() + HOUR, HOUR);
    let client = client_of(early, reviews());
    refused(handshake(server_of(ca.issue(&reviews())), client).await, "NotValidYet");
}

fn fixed_client(own: Own, trust: &IdentityWatch) -> Arc<ClientConfig> {
    let expected = ExpectedIdentities::one(reviews());
    let verify = Verify::Peer { trust: Trust::Current(trust.clone()), expected };
    ClientTls { own, verify, alpn: Vec::new(), min_version: MinVersion::Tls12 }.build().unwrap()
}

#[tokio::test]
async fn leaves_without_exactly_one_identity_are_refused() {
    let ca = ca();
    let trust = watch_of(ca.issue(&ratings()));
    let good = "spiffe://cluster.local/ns/default/sa/ratings";
    let evil = "spiffe://cluster.local/ns/default/sa/admin";
    for (uris, reason) in [
        (vec![good], ""),
        (vec![good, evil], "2 URI names"),
        (vec![good, good], "2 URI names"),
        (vec![], "0 URI names"),
        (vec!["https://example.com/"], "no SPIFFE identity"),
    ] {
        let (chain, key) = ca.forge(&uris, &[ForClients, ForServers]);
        let client = fixed_client(Own::Fixed(certified(&chain, &key)), &trust);
        let result = handshake(server_of(ca.issue(&reviews())), client).await;
        match reason {
            "" => assert_eq!(result.unwrap().0.peer().identity(), Some(ratings())),
            reason => refused(result, reason),
        }
    }
}

#[tokio::test]
async fn a_certificate_only_serves_what_it_is_meant_for() {
    let ca = ca();
    let trust = watch_of(ca.issue(&ratings()));
    let (chain, key) = ca.forge(&["spiffe://cluster.local/ns/default/sa/ratings"], &[ForServers]);
    let client = fixed_client(Own::Fixed(certified(&chain, &key)), &trust);
    refused(handshake(server_of(ca.issue(&reviews())), client).await, "RequiredEku");
    let (chain, key) = ca.forge(&["spiffe://cluster.local/ns/default/sa/reviews"], &[ForClients]);
    let server = ServerTls {
        own: Own::Fixed(certified(&chain, &key)),
        client_auth: ClientAuth::None,
        verify: Verify::Nothing,
        alpn: Vec::new(),
        min_version: MinVersion::Tls12,
    };
    let client = fixed_client(Own::Nothing, &trust);
    refused(handshake(server.build().unwrap(), client).await, "RequiredEku");
}

#[tokio::test]
async fn whether_a_client_needs_a_certificate_is_the_servers_choice() {
    let ca = ca();
    let trust = watch_of(ca.issue(&ratings()));
    let server = |auth| server_config(watch_of(ca.issue(&reviews())), auth, &[]).unwrap();
    let without = || fixed_client(Own::Nothing, &trust);
    refused(handshake(server(ClientAuth::Required), without()).await, "no certificate");
    for auth in [ClientAuth::Optional, ClientAuth::None] {
        let (stream, _) = handshake(server(auth), without()).await.unwrap();
        assert!(stream.peer().chain().is_empty() && stream.peer().identity().is_none());
    }
    let with = client_of(ca.issue(&ratings()), reviews());
    let (stream, _) = handshake(server(ClientAuth::Optional), with).await.unwrap();
    assert_eq!(stream.peer().identity(), Some(ratings()));
    // an optional certificate is still verified
    let stranger = fixed_client(Own::Current(watch_of(crate::fixtures::ca().issue(&ratings()))), &trust);
    refused(handshake(server(ClientAuth::Optional), stranger).await, "UnknownIssuer");
}

#[tokio::test]
async fn renewal_reaches_new_handshakes_and_leaves_open_connections_alone() {
    let ca = ca();
    let (publish_server, server_watch) = watch::channel(ca.issue(&reviews()));
    let (publish_client, client_watch) = watch::channel(ca.issue(&ratings()));
    let server = server_config(server_watch, ClientAuth::Required, &[]).unwrap();
    let client = client_config(client_watch, ExpectedIdentities::one(reviews()), &[]).unwrap();
    let mut open = handshake(Arc::clone(&server), Arc::clone(&client)).await.unwrap();
    let (renewed_server, renewed_client) = (ca.issue(&reviews()), ca.issue(&ratings()));
    publish_server.send_replace(Arc::clone(&renewed_server));
    publish_client.send_replace(Arc::clone(&renewed_client));
    let new = handshake(server, client).await.unwrap();
    assert_eq!(new.0.peer().chain()[0], renewed_client.chain[0]);
    assert_eq!(new.1.get_ref().1.peer_certificates().unwrap()[0], renewed_server.chain[0]);
    assert_ne!(open.0.peer().chain()[0], renewed_client.chain[0]);
    assert_ne!(serial_of(&renewed_server), serial_of(&renewed_client));
    let (served, asked) = tokio::join!(echo_one(&mut open.0), ask_one(&mut open.1));
    served.and(asked).unwrap();
}

#[tokio::test]
async fn roots_follow_the_identity_that_is_current() {
    let (old, new) = (ca(), ca());
    let (publish, source) = watch::channel(old.issue(&reviews()));
    let server = server_config(source, ClientAuth::Required, &[]).unwrap();
    // believes both roots, presents one of the new authority
    let both = [old.root.roots(), new.root.roots()].concat();
    let client = ClientTls {
        own: Own::Current(watch_of(new.issue(&ratings()))),
        verify: Verify::Peer {
            trust: Trust::Fixed(Arc::new(Anchors::new(&both).unwrap())),
            expected: ExpectedIdentities::one(reviews()),
        },
        alpn: Vec::new(),
        min_version: MinVersion::Tls13,
    };
    let client = client.build().unwrap();
    refused(handshake(Arc::clone(&server), Arc::clone(&client)).await, "UnknownIssuer");
    publish.send_replace(new.issue(&reviews()));
    handshake(server, client).await.unwrap();
}

#[tokio::test]
async fn a_session_is_never_resumed() {
    let ca = ca();
    let server = server_of(ca.issue(&reviews()));
    let client = client_of(ca.issue(&ratings()), reviews());
    for _ in 0..3 {
        let (_, stream) = handshake(Arc::clone(&server), Arc::clone(&client)).await.unwrap();
        let kind = stream.get_ref().1.handshake_kind();
        assert!(matches!(kind, Some(HandshakeKind::Full | HandshakeKind::FullWithHelloRetryRequest)));
    }
}

#[tokio::test]
async fn protocols_nobody_shares_are_no_reason_to_refuse() {
    let ca = ca();
    let expected = || ExpectedIdentities::one(reviews());
    let client = client_config(watch_of(ca.issue(&ratings())), expected(), &[b"istio"]).unwrap();
    let (_, stream) = handshake(server_of(ca.issue(&reviews())), client).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), None);
    let client = client_config(watch_of(ca.issue(&ratings())), expected(), &[b"istio", b"http/1.1"]).unwrap();
    let (_, stream) = handshake(server_of(ca.issue(&reviews())), client).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(b"http/1.1".as_slice()));
}

#[tokio::test]
async fn a_fingerprint_is_enough_to_know_the_control_plane() {
    let ca = ca();
    let root = Hash::of(&ca.root.roots()[0]);
    let client = || bootstrap_tls(root, &domain()).unwrap();
    let with_roots =
        |identity| server_config_with_roots(watch_of(identity), ClientAuth::Optional, &[b"h2"]).unwrap();
    let (_, stream) = handshake(with_roots(ca.control_plane()), client()).await.unwrap();
    assert_eq!(peer_identity(stream.get_ref().1), Some(SpiffeId::control_plane(&domain())));
    // a workload of the same mesh is not the control plane: it must not get to see a token
    refused(handshake(with_roots(ca.issue(&reviews())), client()).await, "none of the expected identities");
    // another authority does not have the root
    refused(
        handshake(with_roots(crate::fixtures::ca().control_plane()), client()).await,
        "expected fingerprint",
    );
    // a server that does not present its root cannot be known
    let hidden = server_config(watch_of(ca.control_plane()), ClientAuth::Optional, &[b"h2"]).unwrap();
    refused(handshake(hidden, client()).await, "expected fingerprint");
    // the right root beside a chain that does not lead to it proves nothing
    let forger = crate::fixtures::ca();
    let identity = forger.control_plane();
    let chain = [identity.chain.clone(), ca.root.roots().to_vec()].concat();
    let own = Own::Fixed(Arc::new(certified_key(chain, &identity.key.to_der()).unwrap()));
    let server = ServerTls {
        own,
        client_auth: ClientAuth::None,
        verify: Verify::Nothing,
        alpn: Vec::new(),
        min_version: MinVersion::Tls12,
    };
    refused(handshake(server.build().unwrap(), client()).await, "UnknownIssuer");
}

#[tokio::test]
async fn contexts_from_pem_with_names_to_match() {
    let ca = ca();
    let identity = ca.issue(&reviews());
    let key =
        certified_key_from_pem(identity.chain_pem().as_bytes(), identity.key.to_pem().as_bytes()).unwrap();
    let anchors = Arc::new(Anchors::from_pem(identity.roots_pem().as_bytes()).unwrap());
    let server = ServerTls {
        own: Own::Fixed(Arc::new(key)),
        client_auth: ClientAuth::None,
        verify: Verify::Nothing,
        alpn: Vec::new(),
        min_version: MinVersion::Tls12,
    };
    let server = server.build().unwrap();
    let client =
        |verify| ClientTls { own: Own::Nothing, verify, alpn: Vec::new(), min_version: MinVersion::Tls12 };
    let named = |matchers| {
        let expected = ExpectedIdentities::Names(matchers);
        client(Verify::Peer { trust: Trust::Fixed(Arc::clone(&anchors)), expected }).build().unwrap()
    };
    handshake(Arc::clone(&server), named(vec![])).await.unwrap();
    let matchers = vec![NameMatcher::dns("x"), NameMatcher::uri(reviews().as_str())];
    handshake(Arc::clone(&server), named(matchers)).await.unwrap();
    let result = handshake(Arc::clone(&server), named(vec![NameMatcher::uri("spiffe://x")])).await;
    refused(result, "no name of the peer");
    let by_name = Verify::Peer { trust: Trust::Fixed(anchors), expected: ExpectedIdentities::ServerName };
    let result = handshake(Arc::clone(&server), client(by_name).build().unwrap()).await;
    refused(result, "NotValidForName");
    handshake(server, client(Verify::Nothing).build().unwrap()).await.unwrap();
}

#[test]
fn a_key_that_is_not_the_leafs_is_refused() {
    let ca = ca();
    let (one, two) = (ca.issue(&reviews()), ca.issue(&reviews()));
    let result = certified_key(one.chain.clone(), &two.key.to_der());
    assert!(result.is_err());
    let result = certified_key_from_pem(one.chain_pem().as_bytes(), two.key.to_pem().as_bytes());
    assert!(result.is_err());
}
