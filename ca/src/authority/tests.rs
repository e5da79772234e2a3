use super::*;
use rcgen::CustomExtension;
use webpki::EndEntityCert;

const DAY: Duration = Duration::from_secs(86_400);

fn t0() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn domain() -> TrustDomain {
    TrustDomain::default()
}

fn serial(n: u8) -> Serial {
    Serial::from_bytes([n; 16])
}

fn authority() -> Authority {
    let root = SigningRoot::generate(&domain(), t0(), serial(1)).unwrap();
    root.member(&domain(), "a", Lifetimes::default(), t0(), serial(2)).unwrap()
}

fn caller(text: &str) -> Caller {
    Caller::from_redeemed_token(SpiffeId::parse(text).unwrap(), "t")
}

fn reviews() -> Caller {
    caller("spiffe://cluster.local/ns/default/sa/reviews")
}

fn csr() -> CertificateSigningRequestDer<'static> {
    PrivateKey::generate().unwrap().request().unwrap().der().clone()
}

fn sign(requested: Option<Duration>, now: SystemTime) -> Result<Facts, SignError> {
    let chain = authority().sign(&csr(), &reviews(), requested, now, serial(3))?;
    Ok(Facts::parse(&chain.leaf).unwrap())
}

fn verify(chain: &Chain, usage: webpki::KeyUsage, now: SystemTime) -> Result<(), webpki::Error> {
    let roots: Vec<_> = chain.roots.iter().map(|r| webpki::anchor_from_trusted_cert(r).unwrap()).collect();
    let time = rustls_pki_types::UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap());
    EndEntityCert::try_from(&chain.leaf)?
        .verify_for_usage(
            webpki::ALL_VERIFICATION_ALGS,
            &roots,
            &chain.intermediates,
            time,
            usage,
            None,
            None,
        )
        .map(drop)
}

#[test]
fn a_leaf_names_the_caller_and_nothing_else() {
    let facts = sign(None, t0()).unwrap();
    assert_eq!(facts.uris, ["spiffe://cluster.local/ns/default/sa/reviews"]);
    assert!(facts.dns.is_empty() && facts.ips.is_empty() && facts.subject.is_empty());
    assert!(!facts.is_ca);
    assert_eq!(facts.not_before, t0() - BACK_DATE);
    assert_eq!(facts.not_after, t0() + DAY);
}

#[test]
fn a_leaf_verifies_as_client_and_as_server_but_not_after_its_end() {
    let chain = authority().sign(&csr(), &reviews(), None, t0(), serial(3)).unwrap();
    verify(&chain, webpki::KeyUsage::client_auth(), t0()).unwrap();
    verify(&chain, webpki::KeyUsage::server_auth(), t0()).unwrap();
    assert!(verify(&chain, webpki::KeyUsage::client_auth(), t0() + DAY + BACK_DATE).is_err());
    assert!(verify(&chain, webpki::KeyUsage::client_auth(), t0() - DAY).is_err());
    let roots = SigningRoot::generate(&domain(), t0(), serial(9)).unwrap().roots().to_vec();
    assert!(verify(&Chain { roots, ..chain }, webpki::KeyUsage::client_auth(), t0()).is_err());
}

#[test]
fn names_of_others_are_refused_and_named() {
    let uri = |text: &str| SanType::URI(text.try_into().unwrap());
    let dns = |text: &str| SanType::DnsName(text.try_into().unwrap());
    let own = uri("spiffe://cluster.local/ns/default/sa/reviews");
    let admin = uri("spiffe://cluster.local/ns/default/sa/admin");
    let wanted = |names: &[SanType]| {
        let mut params = CertificateParams::default();
        params.subject_alt_names = names.to_vec();
        let csr = params.serialize_request(&KeyPair::generate().unwrap()).unwrap();
        authority().sign(csr.der(), &reviews(), None, t0(), serial(3)).map(drop).map_err(|e| e.to_string())
    };
    // as agents of Istio ask
    assert_eq!(wanted(std::slice::from_ref(&own)), Ok(()));
    let refused = |names: &str| {
        let who = "`spiffe://cluster.local/ns/default/sa/reviews`";
        Err(format!("the certificate request asks for names that are not {who}'s: {names}"))
    };
    let foreign = "URI:spiffe://cluster.local/ns/default/sa/admin";
    assert_eq!(wanted(std::slice::from_ref(&admin)), refused(foreign));
    let address = SanType::IpAddress([10, 0, 0, 1].into());
    let several = [own, admin, dns("istiod.istio-system.svc"), address];
    assert_eq!(wanted(&several), refused(&format!("{foreign}, DNS:istiod.istio-system.svc, IP:10.0.0.1")));
    let many: Vec<_> = (0..20).map(|n| dns(&format!("{n}.example"))).collect();
    let told = wanted(&many).unwrap_err();
    assert!(told.ends_with("DNS:7.example, and 12 more"), "{told}");
    let long = wanted(&[dns(&"x".repeat(8000))]).unwrap_err();
    assert!(long.len() < 600, "{long}");
}

#[test]
fn wishes_in_the_request_are_ignored() {
    let key = PrivateKey::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "admin");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.custom_extensions = vec![CustomExtension::from_oid_content(&[1, 2, 3, 4], vec![5, 0])];
    let csr = params.serialize_request(&key.key_pair().unwrap()).unwrap();
    let chain = authority().sign(csr.der(), &reviews(), None, t0(), serial(3)).unwrap();
    let facts = Facts::parse(&chain.leaf).unwrap();
    assert_eq!(facts.uris, ["spiffe://cluster.local/ns/default/sa/reviews"]);
    assert!(facts.dns.is_empty() && facts.subject.is_empty() && !facts.is_ca && !facts.can_sign);
}

#[test]
fn lifetimes_are_granted_within_limits() {
    let lifetime = |requested| sign(requested, t0()).unwrap().not_after.duration_since(t0()).unwrap();
    assert_eq!(lifetime(None), DAY);
    assert_eq!(lifetime(Some(Duration::ZERO)), DAY);
    assert_eq!(lifetime(Some(Duration::from_secs(20))), Duration::from_secs(20));
    assert_eq!(lifetime(Some(DAY * 5000)), DAY * 90);
    assert_eq!(lifetime(Some(Duration::from_secs(u64::MAX / 4))), DAY * 90);
}

#[test]
fn a_leaf_ends_no_later_than_its_issuer() {
    let facts = sign(None, t0() + MAX_MEMBER_LIFETIME - Duration::from_secs(5)).unwrap();
    assert_eq!(facts.not_after, t0() + MAX_MEMBER_LIFETIME);
    assert!(matches!(sign(None, t0() + MAX_MEMBER_LIFETIME + DAY), Err(SignError::IssuerNotValid)));
    assert!(matches!(sign(None, t0() - DAY), Err(SignError::IssuerNotValid)));
}

#[test]
fn the_control_planes_identity_and_foreign_ones_are_not_signed() {
    let authority = authority();
    let sign = |who: &str| authority.sign(&csr(), &caller(who), None, t0(), serial(3));
    assert!(matches!(sign("spiffe://cluster.local/ns/istio-system/sa/istiod"), Err(SignError::Reserved(_))));
    assert!(matches!(
        sign("spiffe://other.domain/ns/default/sa/reviews"),
        Err(SignError::TrustDomain { .. })
    ));
    assert!(matches!(
        sign("spiffe://cluster.local.evil/ns/default/sa/reviews"),
        Err(SignError::TrustDomain { .. })
    ));
}

#[test]
fn the_control_plane_signs_for_itself_with_dns_names() {
    let names = ["istiod.istio-system.svc".to_owned()];
    let chain = authority().sign_control_plane(&csr(), &names, None, t0(), serial(3)).unwrap();
    let facts = Facts::parse(&chain.leaf).unwrap();
    assert_eq!(facts.spiffe_id().unwrap(), SpiffeId::control_plane(&domain()));
    assert_eq!(facts.dns, names);
    verify(&chain, webpki::KeyUsage::server_auth(), t0()).unwrap();
    let bad = ["é".to_owned()];
    assert!(matches!(
        authority().sign_control_plane(&csr(), &bad, None, t0(), serial(3)),
        Err(SignError::Name(_))
    ));
}

#[test]
fn requests_of_every_allowed_key_type_are_signed() {
    let key = rcgen::KeyPair::generate_rsa_for(&rcgen::PKCS_RSA_SHA256, rcgen::RsaKeySize::_2048).unwrap();
    let others = [&rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519];
    let keys = others.map(|alg| rcgen::KeyPair::generate_for(alg).unwrap());
    for key in keys.iter().chain([&key]) {
        let csr = CertificateParams::default().serialize_request(key).unwrap();
        let chain = authority().sign(csr.der(), &reviews(), None, t0(), serial(3)).unwrap();
        verify(&chain, webpki::KeyUsage::client_auth(), t0()).unwrap();
        let facts = Facts::parse(&chain.leaf).unwrap();
        assert_eq!(facts.public_key, rcgen::PublicKeyData::subject_public_key_info(key));
    }
}

#[test]
fn a_member_cannot_make_authorities_below_it() {
    let member = authority();
    let facts = Facts::parse(&member.chain()[0]).unwrap();
    assert_eq!((facts.is_ca, facts.path_len), (true, Some(0)));
    assert_eq!(member.validity().1, t0() + MAX_MEMBER_LIFETIME);
    // a forged authority below the member's intermediate is not believed
    let key = KeyPair::generate().unwrap();
    let mut params = authority_params(&domain(), "forged", BasicConstraints::Unconstrained);
    set_validity(&mut params, t0(), t0() + DAY, serial(4));
    let forged = params.signed_by(&key, &member.issuer).unwrap().der().clone();
    let chain = std::iter::once(forged).chain(member.chain().to_vec()).collect();
    let key = PrivateKey::from_key_pair(&key);
    let below = Authority::new(domain(), chain, key, member.roots().to_vec(), Lifetimes::default()).unwrap();
    let chain = below.sign(&csr(), &reviews(), None, t0(), serial(5)).unwrap();
    assert!(verify(&chain, webpki::KeyUsage::client_auth(), t0()).is_err());
}

#[test]
fn an_answer_round_trips_and_ends_with_the_roots() {
    let chain = authority().sign(&csr(), &reviews(), None, t0(), serial(3)).unwrap();
    let reply = chain.to_reply();
    assert_eq!(reply.len(), 3);
    assert_eq!(Chain::from_reply(&reply).unwrap(), chain);
    assert!(Chain::from_reply(&reply[..1]).is_err());
    assert!(Chain::from_reply(&[]).is_err());
}

#[test]
fn an_authority_is_restored_from_its_parts() {
    let made = authority();
    let key = PrivateKey::from_pem(made.key_pem().as_bytes()).unwrap();
    let (chain, roots) = (made.chain().to_vec(), made.roots().to_vec());
    let again = Authority::new(domain(), chain.clone(), key, roots.clone(), Lifetimes::default()).unwrap();
    let chain_of = again.sign(&csr(), &reviews(), None, t0(), serial(3)).unwrap();
    verify(&chain_of, webpki::KeyUsage::client_auth(), t0()).unwrap();
    let other = PrivateKey::generate().unwrap();
    assert!(Authority::new(domain(), chain, other, roots, Lifetimes::default()).is_err());
}

// ---- plugged-in files ----------------------------------------------------------

fn root() -> SigningRoot {
    SigningRoot::generate(&domain(), t0(), serial(1)).unwrap()
}

/// Files of an intermediate below `root`.
fn files(root: &SigningRoot, constraints: BasicConstraints) -> PluggedIn {
    let issuer = Issuer::from_ca_cert_der(&root.cert, root.key.key_pair().unwrap()).unwrap();
    let pair = KeyPair::generate().unwrap();
    let mut params = authority_params(&domain(), "plugged", constraints);
    set_validity(&mut params, t0(), t0() + DAY * 100, serial(7));
    let cert = params.signed_by(&pair, &issuer).unwrap().der().clone();
    PluggedIn {
        ca_cert: x509::certificates_to_pem([&cert]),
        ca_key: PrivateKey::from_key_pair(&pair).to_pem(),
        cert_chain: x509::certificates_to_pem([&cert, &root.cert]),
        root_cert: x509::certificates_to_pem([&root.cert]),
    }
}

#[test]
fn plugged_in_authority_signs_through_its_whole_chain() {
    for (constraints, intermediates) in [
        (BasicConstraints::Unconstrained, 2),
        (BasicConstraints::Constrained(1), 2),
        (BasicConstraints::Constrained(0), 1),
    ] {
        let plugged = files(&root(), constraints).check(t0()).unwrap();
        let member = plugged.member(&domain(), "a", Lifetimes::default(), t0(), serial(2)).unwrap();
        let chain = member.sign(&csr(), &reviews(), None, t0(), serial(3)).unwrap();
        assert_eq!(chain.intermediates.len(), intermediates);
        verify(&chain, webpki::KeyUsage::client_auth(), t0()).unwrap();
        assert!(member.validity().1 <= t0() + DAY * 100);
    }
}

#[test]
fn a_made_root_can_be_stored_as_files_and_plugged_in_again() {
    let made = root();
    let again = made.to_files().check(t0()).unwrap();
    assert_eq!(again.certificate(), made.certificate());
    let member = again.member(&domain(), "a", Lifetimes::default(), t0(), serial(2)).unwrap();
    let chain = member.sign(&csr(), &reviews(), None, t0(), serial(3)).unwrap();
    assert_eq!(chain.intermediates.len(), 1);
    verify(&chain, webpki::KeyUsage::server_auth(), t0()).unwrap();
}

#[test]
fn a_plugged_in_root_that_may_have_nothing_below_it_signs_itself_also_in_a_rotation() {
    let pair = KeyPair::generate().unwrap();
    let mut params = authority_params(&domain(), "alone", BasicConstraints::Constrained(0));
    set_validity(&mut params, t0(), t0() + DAY * 100, serial(7));
    let cert = params.self_signed(&pair).unwrap();
    let files = PluggedIn {
        ca_cert: cert.pem(),
        ca_key: PrivateKey::from_key_pair(&pair).to_pem(),
        cert_chain: String::new(),
        root_cert: cert.pem(),
    };
    let plugged = files.check(t0()).unwrap();
    let member = plugged.member(&domain(), "a", Lifetimes::default(), t0(), serial(2)).unwrap();
    let chain = member.sign(&csr(), &reviews(), None, t0(), serial(3)).unwrap();
    assert!(chain.intermediates.is_empty());
    verify(&chain, webpki::KeyUsage::client_auth(), t0()).unwrap();
    let next = root();
    let roots = [plugged.roots(), next.roots()].concat();
    let chain = member.with_roots(roots).unwrap().sign(&csr(), &reviews(), None, t0(), serial(3)).unwrap();
    assert_eq!(chain.roots.len(), 2);
    assert_eq!(Chain::from_reply(&chain.to_reply()).unwrap(), chain);
    verify(&chain, webpki::KeyUsage::client_auth(), t0()).unwrap();
}

#[test]
fn plugged_in_files_that_do_not_fit_are_told_apart() {
    let good = || files(&root(), BasicConstraints::Unconstrained);
    let other = good();
    let check = |files: PluggedIn, at: SystemTime| files.check(at).unwrap_err().to_string();
    let text = check(PluggedIn { ca_key: other.ca_key.clone(), ..good() }, t0());
    assert_eq!(text, "ca-key.pem is not the key of ca-cert.pem");
    let text = check(PluggedIn { root_cert: other.root_cert.clone(), ..good() }, t0());
    assert!(text.contains("is not signed by the next certificate"), "{text}");
    let text = check(PluggedIn { cert_chain: other.cert_chain, ..good() }, t0());
    assert!(text.contains("is not signed by the next certificate"), "{text}");
    let text = check(PluggedIn { ca_cert: String::new(), ..good() }, t0());
    assert_eq!(text, "ca-cert.pem cannot be used");
    let text = check(PluggedIn { ca_key: Zeroizing::new("x".to_owned()), ..good() }, t0());
    assert_eq!(text, "ca-key.pem cannot be used");
    let text = check(PluggedIn { root_cert: String::new(), ..good() }, t0());
    assert_eq!(text, "root-cert.pem cannot be used");
    let text = check(good(), t0() + DAY * 101);
    assert!(text.starts_with("ca-cert.pem") && text.contains("not valid at this time"), "{text}");
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::default().self_signed(&key).unwrap();
    let not_ca = PluggedIn {
        ca_cert: leaf.pem(),
        ca_key: Zeroizing::new(key.serialize_pem()),
        cert_chain: String::new(),
        root_cert: leaf.pem(),
    };
    assert!(check(not_ca, t0()).contains("may not sign certificates"));
}
