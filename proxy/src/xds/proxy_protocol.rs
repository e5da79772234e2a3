//! Settings of the PROXY protocol on both sides, from their protos, validated once.

use envoy_types::pb::envoy::config::core::v3 as pb;

use super::decode::{Invalid, Under as _};

/// What a header of version 2 may say besides addresses, in bytes: its length has 16 bits, and IPv6 takes 36.
pub const MOST_TLVS: usize = 65_535 - 36;

/// Something that a header of version 2 says besides addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tlv {
    /// Its type.
    pub kind: u8,
    /// Its value.
    pub value: Box<[u8]>,
}

impl Tlv {
    /// How many bytes it takes in a header.
    #[must_use]
    pub fn length(&self) -> usize {
        3 + self.value.len()
    }
}

/// Which TLVs of a client's header are remembered or handed on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum PassTlvs {
    /// None.
    #[default]
    None,
    /// Each.
    All,
    /// Those of these types.
    Only(Box<[u8]>),
}

impl PassTlvs {
    /// From its proto.
    ///
    /// # Errors
    ///
    /// A type above 255, or an unknown way to choose.
    pub fn new(pb: Option<pb::ProxyProtocolPassThroughTlVs>) -> Result<Self, Invalid> {
        use pb::proxy_protocol_pass_through_tl_vs::PassTlVsMatchType as Pb;
        let Some(pb) = pb else { return Ok(Self::None) };
        match Pb::try_from(pb.match_type) {
            Ok(Pb::IncludeAll) => Ok(Self::All),
            Ok(Pb::Include) => {
                let kinds = pb.tlv_type.into_iter().enumerate().map(|(i, t)| kind(t).at("tlv_type", i));
                kinds.collect::<Result<_, _>>().map(Self::Only)
            }
            Err(_) => Err(Invalid::new("match_type", format!("unknown value {}", pb.match_type))),
        }
    }

    /// Whether those of this type are.
    #[must_use]
    pub fn takes(&self, kind: u8) -> bool {
        match self {
            Self::None => false,
            Self::All => true,
            Self::Only(kinds) => kinds.contains(&kind),
        }
    }
}

/// The form of a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// Text.
    V1,
    /// Binary.
    V2,
}

/// What endpoints are told at the beginning of each connection.
#[derive(Debug, PartialEq, Eq)]
pub struct ProxyProtocol {
    /// In which form.
    pub version: Version,
    /// Which TLVs of the client's header are handed on.
    pub pass: PassTlvs,
    /// Further TLVs.
    pub added: Box<[Tlv]>,
}

impl ProxyProtocol {
    /// From its proto.
    ///
    /// # Errors
    ///
    /// An unknown version, or TLVs that no header can have.
    pub fn new(pb: pb::ProxyProtocolConfig) -> Result<Self, Invalid> {
        use pb::proxy_protocol_config::Version as Pb;
        let version = match Pb::try_from(pb.version) {
            Ok(Pb::V1) => Version::V1,
            Ok(Pb::V2) => Version::V2,
            Err(_) => return Err(Invalid::new("version", format!("unknown value {}", pb.version))),
        };
        let pass = PassTlvs::new(pb.pass_through_tlvs).under("pass_through_tlvs")?;
        Ok(Self { version, pass, added: added(pb.added_tlvs)? })
    }
}

/// TLVs of the configuration.
///
/// # Errors
///
/// One that no header can have, or more than one header can have.
pub fn added(pb: Vec<pb::TlvEntry>) -> Result<Box<[Tlv]>, Invalid> {
    let tlvs = pb.into_iter().enumerate().map(|(i, entry)| tlv(entry).at("added_tlvs", i));
    let tlvs = tlvs.collect::<Result<Box<[_]>, _>>()?;
    let length: usize = tlvs.iter().map(Tlv::length).sum();
    if length > MOST_TLVS {
        let reason = format!("take {length} bytes, and a header has room for {MOST_TLVS}");
        return Err(Invalid::new("added_tlvs", reason));
    }
    Ok(tlvs)
}

fn tlv(pb: pb::TlvEntry) -> Result<Tlv, Invalid> {
    if pb.format_string.is_some() {
        return Err(Invalid::unsupported("format_string"));
    }
    Ok(Tlv { kind: kind(pb.r#type).under("type")?, value: pb.value.into() })
}

fn kind(number: u32) -> Result<u8, Invalid> {
    u8::try_from(number).map_err(|_| Invalid::new("", format!("{number} is above 255")))
}
