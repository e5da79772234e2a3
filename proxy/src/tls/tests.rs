//! Settings of both sides.

use super::*;

fn groups(configured: &[NamedGroup]) -> Vec<NamedGroup> {
    let settings = Settings {
        certificate: None,
        verifier: None,
        alpn: Vec::new(),
        only_tls13: false,
        only_tls12: false,
        groups: configured.into(),
    };
    settings.provider().kx_groups.iter().map(|group| group.name()).collect()
}

#[test]
fn key_exchanges_are_the_configured_ones_in_their_order() {
    let all = groups(&[]);
    assert_eq!(all.first(), Some(&NamedGroup::X25519));
    assert_eq!(all.last(), Some(&NamedGroup::X25519MLKEM768));
    let two = [NamedGroup::X25519MLKEM768, NamedGroup::secp256r1];
    assert_eq!(groups(&two), two);
}
