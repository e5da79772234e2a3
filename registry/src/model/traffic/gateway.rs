//! Load balancers at the edge of the mesh (`Gateway` of Istio).

use std::collections::BTreeMap;

use super::Port;
use crate::config::decode::{enumeration, message};

message! {
    /// Servers that run on the selected proxies.
    pub struct Gateway {
        /// What the proxies listen for.
        servers: Vec<Server> = "servers";
        /// Labels of the proxies.
        selector: BTreeMap<String, String> = "selector";
    }

    /// One listening port.
    pub struct Server {
        /// The port.
        port: Option<Port> = "port";
        /// Address or Unix socket to listen on; empty is every address.
        bind: String = "bind";
        /// Hosts, with an optional namespace of the VirtualServices before a slash.
        hosts: Vec<String> = "hosts";
        /// TLS.
        tls: Option<ServerTlsSettings> = "tls";
        /// Where unmatched connections go.
        default_endpoint: String = "defaultEndpoint";
        /// Name, unique in the gateway.
        name: String = "name";
    }

    /// TLS of a server.
    pub struct ServerTlsSettings {
        /// Redirect plain HTTP to HTTPS.
        https_redirect: bool = "httpsRedirect";
        /// Which kind of TLS.
        mode: ServerTlsMode = "mode";
        /// File of the certificate.
        server_certificate: String = "serverCertificate";
        /// File of the key.
        private_key: String = "privateKey";
        /// File of the authorities of clients.
        ca_certificates: String = "caCertificates";
        /// File of revoked certificates.
        ca_crl: String = "caCrl";
        /// Secret with certificate and key.
        credential_name: String = "credentialName";
        /// Several secrets, at most one for each kind of key.
        credential_names: Vec<String> = "credentialNames";
        /// Secret or configuration map with the authorities of clients.
        ca_cert_credential_name: String = "caCertCredentialName";
        /// Several certificates by file.
        tls_certificates: Vec<TlsCertificate> = "tlsCertificates";
        /// Names of which a client's certificate must have one.
        subject_alt_names: Vec<String> = "subjectAltNames";
        /// Hashes of accepted public keys, base64.
        verify_certificate_spki: Vec<String> = "verifyCertificateSpki";
        /// Hashes of accepted certificates, hexadecimal.
        verify_certificate_hash: Vec<String> = "verifyCertificateHash";
        /// Lowest version of TLS.
        min_protocol_version: TlsProtocol = "minProtocolVersion";
        /// Highest version of TLS.
        max_protocol_version: TlsProtocol = "maxProtocolVersion";
        /// Cipher suites by OpenSSL name, for TLS 1.2.
        cipher_suites: Vec<String> = "cipherSuites";
        /// Accept any client certificate.
        insecure_skip_verify: Option<bool> = "insecureSkipVerify";
    }

    /// A certificate by file.
    pub struct TlsCertificate {
        /// File of the certificate.
        server_certificate: String = "serverCertificate";
        /// File of the key.
        private_key: String = "privateKey";
        /// File of the authorities of clients.
        ca_certificates: String = "caCertificates";
    }
}

enumeration! {
    /// Which kind of TLS a server speaks.
    pub enum ServerTlsMode {
        /// Not terminated; routed by server name.
        Passthrough = "PASSTHROUGH",
        /// Without client certificates.
        Simple = "SIMPLE",
        /// With client certificates.
        Mutual = "MUTUAL",
        /// Not terminated; the server name holds the cluster.
        AutoPassthrough = "AUTO_PASSTHROUGH",
        /// With the workload's certificate, as inside the mesh.
        IstioMutual = "ISTIO_MUTUAL",
        /// Client certificates are asked for and may be missing.
        OptionalMutual = "OPTIONAL_MUTUAL",
    }

    /// A version of TLS.
    pub enum TlsProtocol {
        /// The default, 1.2 for the lowest and 1.3 for the highest.
        Auto = "TLS_AUTO",
        /// 1.0.
        Tls10 = "TLSV1_0",
        /// 1.1.
        Tls11 = "TLSV1_1",
        /// 1.2.
        Tls12 = "TLSV1_2",
        /// 1.3.
        Tls13 = "TLSV1_3",
    }
}
