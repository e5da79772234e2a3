//! Declares messages, enumerations and choices: one list of fields is the struct and its reading.

/// Declares messages: the struct and how it is read, from one list of fields.
macro_rules! message {
    ($(
        $(#[$meta:meta])*
        pub struct $name:ident {
            $( $(#[$fmeta:meta])* $field:ident : $ty:ty = $json:literal $(| $alias:literal)? $(~ $why:literal)?; )*
        }
        $( oneof { $( $(#[$ometa:meta])* $ofield:ident : $oty:ty; )* } )?
    )*) => {$(
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq, Default)]
        pub struct $name {
            $( $(#[$fmeta])* pub $field: $ty, )*
            $($( $(#[$ometa])* pub $ofield: Option<$oty>, )*)?
        }

        impl $crate::config::decode::Decode for $name {
            fn decode(
                node: &$crate::config::node::Node,
                cx: &mut $crate::config::decode::Decoder,
            ) -> Option<Self> {
                #[allow(unused_mut, reason = "a message may have no fields")]
                let mut out = Self::default();
                for entry in cx.map(node)? {
                    let key = cx.canonical(&entry.key);
                    match key.as_str() {
                        $( $json $(| $alias)? => {
                            cx.field(entry, &mut out.$field);
                            $( cx.deprecated(entry, $why); )?
                        } )*
                        _ => {
                            $($( if <$oty as $crate::config::decode::OneOf>::NAMES.contains(&key.as_str()) {
                                cx.one_of(&key, entry, &mut out.$ofield);
                                continue;
                            } )*)?
                            let own: &[&str] = &[$($json),*];
                            #[allow(unused_mut, reason = "only messages with a choice add to it")]
                            let mut known = own.to_vec();
                            $($( known.extend(<$oty as $crate::config::decode::OneOf>::NAMES); )*)?
                            cx.unknown(entry, &known);
                        }
                    }
                }
                Some(out)
            }
        }
    )*};
}

/// Declares enumerations; the first variant is the one that an absent field means.
macro_rules! enumeration {
    ($(
        $(#[$meta:meta])*
        pub enum $name:ident {
            $(#[$fmeta:meta])* $first:ident = $fjson:literal
            $(, $(#[$vmeta:meta])* $variant:ident = $vjson:literal)* $(,)?
        }
    )*) => {$(
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        pub enum $name {
            $(#[$fmeta])* #[default] $first,
            $( $(#[$vmeta])* $variant, )*
        }

        impl $name {
            /// Every name that Istio has for it.
            pub const NAMES: &'static [&'static str] = &[$fjson $(, $vjson)*];

            /// The name that Istio has for it.
            #[must_use]
            pub fn as_str(self) -> &'static str {
                match self {
                    Self::$first => $fjson,
                    $( Self::$variant => $vjson, )*
                }
            }
        }

        impl $crate::config::decode::Decode for $name {
            fn decode(
                node: &$crate::config::node::Node,
                cx: &mut $crate::config::decode::Decoder,
            ) -> Option<Self> {
                match node.as_str() {
                    Some($fjson) => return Some(Self::$first),
                    $( Some($vjson) => return Some(Self::$variant), )*
                    _ => {}
                }
                cx.wrong(node, &format!("one of {}", Self::NAMES.join(", ")));
                None
            }
        }
    )*};
}

/// Declares choices among fields of which at most one may be set.
macro_rules! oneof {
    ($(
        $(#[$meta:meta])*
        pub enum $name:ident {
            $( $(#[$vmeta:meta])* $variant:ident($ty:ty) = $json:literal, )*
        }
    )*) => {$(
        $(#[$meta])*
        #[derive(Debug, Clone, PartialEq)]
        pub enum $name {
            $( $(#[$vmeta])* $variant($ty), )*
        }

        impl $crate::config::decode::OneOf for $name {
            const NAMES: &'static [&'static str] = &[$($json),*];

            fn decode_field(
                name: &str,
                node: &$crate::config::node::Node,
                cx: &mut $crate::config::decode::Decoder,
            ) -> Option<Self> {
                use $crate::config::decode::Decode as _;
                match name {
                    $( $json => <$ty>::decode(node, cx).map(Self::$variant), )*
                    _ => None,
                }
            }

            fn name(&self) -> &'static str {
                match self {
                    $( Self::$variant(_) => $json, )*
                }
            }
        }
    )*};
}

pub(crate) use {enumeration, message, oneof};
