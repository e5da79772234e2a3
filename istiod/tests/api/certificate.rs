//! Callers that present a client certificate.

use std::sync::Arc;

use bytes::Bytes;
use ca::authn::Caller as Requester;
use ca::authority::{Authority, Lifetimes, Serial, SigningRoot};
use ca::identity::{SpiffeId, TrustDomain};
use ca::renewal::Clock;
use ca::svid::{Identity, PrivateKey};
use ca::tls::{ClientTls, ExpectedIdentities, MinVersion, Own, Trust, Verify};
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::sync::watch;

use crate::member::{Member, PATIENCE, Start, root};

fn authority(root: &SigningRoot, clock: &Clock) -> Authority {
    let serial = Serial::random().unwrap();
    root.member(&TrustDomain::default(), "istiod-1", Lifetimes::default(), clock(), serial).unwrap()
}

/// The identity of a workload; of the control plane, if none is named.
fn identity(authority: &Authority, account: Option<&str>, clock: &Clock) -> Arc<Identity> {
    let key = PrivateKey::generate().unwrap();
    let request = key.request().unwrap();
    let (csr, serial) = (request.der(), Serial::random().unwrap());
    let chain = match account {
        None => authority.sign_control_plane(csr, &["localhost".to_owned()], None, clock(), serial),
        Some(account) => {
            let id = SpiffeId::workload(&TrustDomain::default(), "ops", account).unwrap();
            authority.sign(csr, &Requester::from_redeemed_token(id, "t"), None, clock(), serial)
        }
    };
    Arc::new(Identity::new(chain.unwrap(), key, clock()).unwrap())
}

/// `GET` over TLS, with this certificate or none; nothing if the connection is refused.
async fn get(member: &Member, own: Own, trust: &Arc<Identity>, path: &str) -> Option<(StatusCode, Value)> {
    let expected = ExpectedIdentities::one(SpiffeId::control_plane(&TrustDomain::default()));
    let verify = Verify::Peer { trust: Trust::Fixed(trust.anchors().clone()), expected };
    let client = ClientTls { own, verify, alpn: Vec::new(), min_version: MinVersion::Tls12 }.build().unwrap();
    let exchange = async {
        let tcp = TcpStream::connect(member.address).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let stream = tokio_rustls::TlsConnector::from(client).connect(name, tcp).await.ok()?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.ok()?;
        let request = Request::get(path).header("host", "localhost").body(Full::<Bytes>::default()).unwrap();
        let answer = async {
            let response = sender.send_request(request).await.ok()?;
            let (parts, body) = response.into_parts();
            let body = body.collect().await.ok()?.to_bytes();
            Some((parts.status, serde_json::from_slice(&body).unwrap_or_default()))
        };
        tokio::select! {
            answer = answer => answer,
            _ = async { connection.await.unwrap_or_default(); std::future::pending::<()>().await } => unreachable!(),
        }
    };
    tokio::time::timeout(PATIENCE, exchange).await.unwrap()
}

fn own(identity: &Arc<Identity>) -> Own {
    Own::Fixed(identity.certified().clone())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_has_the_role_that_its_identity_was_given_and_no_other() {
    let (root, clock) = root();
    let (strangers, _) = crate::member::root();
    let issuing = authority(&root, &clock);
    let server = identity(&issuing, None, &clock);
    let (operator, workload) =
        (identity(&issuing, Some("alice"), &clock), identity(&issuing, Some("app"), &clock));
    let stranger = identity(&authority(&strangers, &clock), Some("alice"), &clock);
    let (_keep, shown) = watch::channel(server.clone());
    let start = Start { identity: Some(shown), ..Start::default() };
    let member = Member::start_as(start, root, clock.clone()).await;
    let path = "/api/v1/whoami";

    let alice = "spiffe://cluster.local/ns/ops/sa/alice";
    let request = json!({ "identity": alice, "role": "editor", "namespaces": ["shop"] });
    let request = serde_json::from_value(request).unwrap();
    member.api.bind(&istiod::api::Caller::local(), &request).await.unwrap();

    let (status, me) = get(&member, own(&operator), &server, path).await.unwrap();
    assert_eq!((status.as_u16(), &me["name"], &me["role"]), (200, &json!(alice), &json!("editor")), "{me}");
    assert_eq!(me["namespaces"], json!(["shop"]));
    let foreign = get(&member, own(&operator), &server, "/api/v1/config/vs/bank/a").await.unwrap();
    assert_eq!(foreign.0.as_u16(), 403);
    // A workload's certificate is the mesh's too, and opens nothing here.
    assert_eq!(get(&member, own(&workload), &server, path).await.unwrap().0.as_u16(), 401);
    assert_eq!(get(&member, Own::Nothing, &server, path).await.unwrap().0.as_u16(), 401);
    assert_eq!(get(&member, Own::Nothing, &server, "/ready").await.unwrap().0.as_u16(), 200);
    // Another authority's certificate with the same name ends the connection.
    assert!(get(&member, own(&stranger), &server, path).await.is_none());

    // Whoever has a stolen certificate has no role, whatever its identity has.
    let node = ca::x509::Facts::parse(&operator.chain[0]).unwrap().node().unwrap().to_string();
    let revocation = json!({ "node": node, "reason": "stolen", "force": true });
    let revocation = serde_json::from_value(revocation).unwrap();
    member.api.revoke_node(&istiod::api::Caller::local(), &revocation).await.unwrap();
    let (status, told) = get(&member, own(&operator), &server, path).await.unwrap();
    assert!(status.as_u16() == 401 && told.to_string().contains("was revoked at "), "{told}");
    let other = identity(&issuing, Some("alice"), &clock);
    assert_eq!(get(&member, own(&other), &server, path).await.unwrap().0.as_u16(), 200);

    member.api.unbind(&istiod::api::Caller::local(), alice).await.unwrap();
    assert_eq!(get(&member, own(&other), &server, path).await.unwrap().0.as_u16(), 401);
    member.stop().await;
}
